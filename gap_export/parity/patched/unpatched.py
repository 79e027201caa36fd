"""Runs the graphs that a bundle was patched from, as their maker left them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.files import sha256_of
from gap_export.checkpoint.find.bundle_source import resolve_recipe
from gap_export.errors import ParityError, UsageError
from gap_export.runtime.backends.backend import (
    DECODER,
    EMBEDDING,
    VISION,
    Backend,
    Feed,
    FloatArray,
    KVCache,
    Outputs,
)
from gap_export.runtime.backends.onnxruntime_backend import (
    OnnxRuntimeGraphs,
    first_line,
)
from gap_export.runtime.backends.onnxruntime_options import (
    ORT_ERRORS,
    session_options,
    spare_memory,
    start_session,
)
from gap_export.runtime.backends.quiet_onnxruntime import ort
from gap_export.spec.manifest import Manifest, SourcePart
from gap_export.spec.positions import gap_remap

_GRID = "image_grid_thw"
# What vision_config calls the sizes of patches.
_PATCHES = {"size": "patch_size", "frames": "temporal_patch_size", "join": "spatial_merge_size"}


class UnpatchedBackend(OnnxRuntimeGraphs):
    """Vision encoder and decoder of an export, in ONNX Runtime on the CPU.

    Its decoder reads position ids as they are, so they are remapped before it is fed them.
    """

    def __init__(self, manifest: Manifest, folder: Path, patched: Backend) -> None:
        """Prove that these are the graphs the bundle was patched from, and load them.

        Args:
            manifest: Describes the bundle that was patched from it.
            folder: The export's.
            patched: The bundle's; its word embeddings, which are the export's, are used here too.

        Raises:
            UsageError: they are not, or cannot be loaded; or the bundle was not patched, or not by
                the recipe of its model.
            ParityError: the bundle has another tokenizer, word embedding, weights or end of answers
                than they have.
        """
        part = find_export(manifest)
        if part is None:
            raise UsageError(
                "the bundle was not patched from an ONNX export, so there is none to compare with",
                seen=manifest.model.summary,
                allowed="a bundle made by gap-export patch",
                fix="compare it with its checkpoint: gap-export check BUNDLE",
            )
        _check_unchanged(part, folder)
        _check_taken_over(part, manifest)
        _check_facts(manifest, folder)
        self._patched = patched
        vision = json.loads((folder / "config.json").read_bytes())["vision_config"]
        self._patches = {ours: vision.get(theirs, 1) for ours, theirs in _PATCHES.items()}
        graphs = [folder / file.path for file in part.files if file.path.endswith(".onnx")]
        sessions = {
            component: _load(
                next(path for path in graphs if path.name.startswith(component)),
                half=manifest.dtype == "float16",
            )
            for component in (VISION, DECODER)
        }
        super().__init__(sessions, manifest)
        shapes = {value.name: value.shape for value in sessions[VISION].get_inputs()}
        self._takes_patches = len(shapes["pixel_values"]) == 2

    def run(self, component: str, feed: Feed) -> Outputs:
        """See Backend."""
        if component == EMBEDDING:
            return self._patched.run(component, feed)
        if component == VISION and self._takes_patches:
            cut = cut_into_patches(feed["pixel_values"], **self._patches)
            given = {name: cut[name] for name in self._inputs[VISION]}
            found = super().run(component, given)
            return {name: array[None] for name, array in found.items()}
        return super().run(component, feed)

    def decode(self, feed: Feed, cache: KVCache) -> FloatArray:
        """See Backend."""
        feed = dict(feed)
        feed["position_ids"] = gap_remap(feed["position_ids"], feed.pop("kept_positions"))
        return super().decode(feed, cache)


def cut_into_patches(
    pixels: FloatArray, *, size: int, frames: int, join: int
) -> dict[str, NDArray[Any]]:
    """An image as encoders of Qwen2-VL's kind take it.

    Args:
        pixels: [1, 3, h, w].
        size: p, side of a patch.
        frames: Frames of a patch, all of them the image.
        join: Patches along a side of a token.

    Returns:
        ``pixel_values`` [patches, 3 * frames * p * p], token by token, and ``image_grid_thw`` int64
        [1, 3], one and the rows and columns of patches.
    """
    _, channels, height, width = pixels.shape
    rows, cols = height // size, width // size
    found = []
    for row in range(0, rows, join):
        for col in range(0, cols, join):
            for y in range(row * size, (row + join) * size, size):
                for x in range(col * size, (col + join) * size, size):
                    patch = pixels[0, :, y : y + size, x : x + size]
                    found.append(np.stack([patch] * frames, axis=1).reshape(-1))
    assert found[0].size == channels * frames * size * size
    grid = np.array([[1, rows, cols]], dtype=np.int64)
    return {"pixel_values": np.stack(found), _GRID: grid}


def find_export(manifest: Manifest) -> SourcePart | None:
    """The ONNX export that a bundle was patched from; None where it was made of a checkpoint."""
    for part in manifest.source.parts:
        if part.role == "main" and any(file.path.endswith(".onnx") for file in part.files):
            return part
    return None


def _check_unchanged(part: SourcePart, folder: Path) -> None:
    for file in part.files:
        path = folder / file.path
        try:
            same = path.stat().st_size == file.size and sha256_of(path) == file.sha256
        except OSError as err:
            raise UsageError(
                "the export that the bundle was patched from cannot be read",
                seen=err,
                allowed=f"the folder that was patched: {part.location}",
            ) from err
        if not same:
            raise UsageError(
                "this is not the export that the bundle was patched from",
                seen=f"{path} differs",
                allowed=f"sha256 {file.sha256}",
                fix="name the folder that was patched, or patch this one",
            )


def _check_taken_over(part: SourcePart, manifest: Manifest) -> None:
    """What patching leaves as it is, and both sides of the comparison read, is the export's."""
    held = {file.path: file.sha256 for file in manifest.files}
    embedding = manifest.graph(EMBEDDING).file
    for file in part.files:
        name = Path(file.path).name
        if name.endswith(".onnx"):
            name = embedding if name.startswith(EMBEDDING) else ""
        if held.get(name, file.sha256) != file.sha256:
            raise ParityError(
                "the bundle has not got the export's own file",
                seen=f"{name}: SHA-256 {held[name]}",
                allowed=f"{file.sha256}, that of {file.path}",
                fix="patch the export again",
            )


def _check_facts(manifest: Manifest, folder: Path) -> None:
    """How an image is prepared, a model asked and an answer read, as recipe and configs say."""
    recipe = resolve_recipe(manifest, [folder])
    right = {recipe.special_tokens[text] for text in recipe.end_of_answer}
    if not right:
        # The configs were read when the export was patched, and have not changed since.
        config, generation = (
            json.loads(path.read_bytes()) if path.is_file() else {}
            for path in (folder / "config.json", folder / "generation_config.json")
        )
        eos = generation.get(
            "eos_token_id",
            config.get("text_config", {}).get("eos_token_id", config.get("eos_token_id")),
        )
        right = set(eos if isinstance(eos, list) else [eos])
    seen = manifest.decoder.eos_token_ids
    if set(seen) != right:
        raise ParityError(
            "the bundle's answers end with other tokens than recipe and export say",
            seen=", ".join(map(str, seen)),
            allowed=", ".join(map(str, sorted(right))),
            fix="patch the export again",
        )


def _load(path: Path, *, half: bool) -> ort.InferenceSession:
    options = session_options(None)
    if half:
        spare_memory(options)
    try:
        return start_session(path, options, ["CPUExecutionProvider"])
    except ORT_ERRORS as err:
        raise UsageError(
            f"ONNX Runtime {ort.__version__} refuses the unpatched graph",
            seen=f"{path}: {first_line(err)}",
        ) from err
