"""Runs the graphs that a bundle was patched from, as their maker left them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle.files import sha256_of
from gap_export.checkpoint.find.source import resolve_recipe
from gap_export.errors import GapExportError, ParityError, UsageError
from gap_export.runtime.backends.backend import FloatArray
from gap_export.runtime.backends.onnxruntime_backend import ORT_ERRORS
from gap_export.runtime.backends.onnxruntime_options import (
    session_options,
    spare_memory,
    start_session,
)
from gap_export.runtime.backends.quiet_onnxruntime import ort
from gap_export.spec.manifest import Manifest, SourcePart

_DTYPES: Mapping[str, type] = {
    "tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64,
}  # fmt: skip
_MAIN, _EMBEDDING = "main", "embed_tokens"
_CPU = ["CPUExecutionProvider"]

Cache = dict[str, NDArray[Any]]


class UnpatchedGraphs:
    """Vision encoder and decoder of an export, in ONNX Runtime on the CPU.

    Args:
        manifest: Of the bundle that was patched from it.
        folder: The export's.
    """

    def __init__(self, manifest: Manifest, folder: Path) -> None:
        """Prove that these are the graphs the bundle was patched from, and load them.

        Raises:
            UsageError: they are not, or cannot be loaded; or the bundle was not patched, or not by
                the recipe of its model.
            ParityError: the bundle has another tokenizer, word embedding, weights or end of answers
                than they have.
        """
        part = _source(manifest)
        _check_unchanged(part, folder)
        _check_taken_over(part, manifest)
        _check_facts(manifest, folder)
        half = manifest.dtype == "float16"
        self._vision = _load(folder / _graph_file(part, "vision_encoder"), half=half)
        self._decoder = _load(folder / _graph_file(part, "decoder_model_merged"), half=half)
        spec = manifest.decoder
        self._cache_shape = (1, spec.num_key_value_heads, 0, spec.head_dim)

    def encode_image(self, pixel_values: NDArray[np.float32]) -> FloatArray:
        """All visual tokens: [I, 3, height, width] to [I, N, H]."""
        features: FloatArray = _run(
            self._vision, ["image_features"], {"pixel_values": pixel_values}
        )[0]
        return features

    def new_cache(self) -> Cache:
        """An empty cache of one row."""
        return {
            value.name: np.zeros(self._cache_shape, dtype=_DTYPES[value.type])
            for value in self._decoder.get_inputs()
            if value.name.startswith("past_key_values.")
        }

    def decode(
        self,
        *,
        inputs_embeds: FloatArray,
        attention_mask: NDArray[np.int64],
        position_ids: NDArray[np.int64],
        cache: Cache,
    ) -> tuple[FloatArray, Cache]:
        """One step.

        Args:
            inputs_embeds: [1, S, H].
            attention_mask: int64 [1, past + S]; 0 hides a slot from every query.
            position_ids: int64 [1, S], or [A, 1, S], which RoPE reads as they are.
            cache: Of the steps before.

        Returns:
            logits [1, V] of the last token, and the cache of the next step.
        """
        present = [name.replace("past_key_values", "present", 1) for name in cache]
        logits, *grown = _run(
            self._decoder,
            ["logits", *present],
            {
                "inputs_embeds": inputs_embeds,
                "attention_mask": attention_mask,
                "position_ids": position_ids,
                **cache,
            },
        )
        return logits[:, -1], dict(zip(cache, grown, strict=True))


def _source(manifest: Manifest) -> SourcePart:
    for part in manifest.source.parts:
        if part.role == _MAIN and any(file.path.endswith(".onnx") for file in part.files):
            return part
    raise UsageError(
        "the bundle was not patched from an ONNX export, so there is none to compare it with",
        seen=manifest.model.summary,
        allowed="a bundle made by gap-export patch",
        fix="compare it with its checkpoint: gap-export check BUNDLE",
    )


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
    embedding = manifest.graph(_EMBEDDING).file
    for file in part.files:
        name = Path(file.path).name
        if name.endswith(".onnx"):
            name = embedding if name.startswith(_EMBEDDING) else ""
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
    right = {recipe.special_tokens[text] for text in recipe.end_of_answer} or _end_ids(folder)
    seen = manifest.decoder.eos_token_ids
    if set(seen) != right:
        raise ParityError(
            "the bundle's answers end with other tokens than recipe and export say",
            seen=", ".join(map(str, seen)),
            allowed=", ".join(map(str, sorted(right))),
            fix="patch the export again",
        )


def _end_ids(folder: Path) -> set[int]:
    """Of configs that were read when the export was patched, and have not changed since."""
    config, generation = (
        json.loads(path.read_bytes()) if path.is_file() else {}
        for path in (folder / "config.json", folder / "generation_config.json")
    )
    eos = generation.get(
        "eos_token_id", config["text_config"].get("eos_token_id", config.get("eos_token_id"))
    )
    return set(eos if isinstance(eos, list) else [eos])


def _graph_file(part: SourcePart, component: str) -> str:
    names = [file.path for file in part.files if file.path.endswith(".onnx")]
    return next(name for name in names if Path(name).name.startswith(component))


def _load(path: Path, *, half: bool) -> ort.InferenceSession:
    options = session_options(None)
    if half:
        spare_memory(options)
    try:
        return start_session(path, options, _CPU)
    except ORT_ERRORS as err:
        raise UsageError(
            f"ONNX Runtime {ort.__version__} refuses the unpatched graph",
            seen=f"{path}: {_first_line(err)}",
        ) from err


def _run(
    session: ort.InferenceSession, outputs: Sequence[str], feed: Mapping[str, NDArray[Any]]
) -> list[NDArray[Any]]:
    dtypes = {value.name: _DTYPES[value.type] for value in session.get_inputs()}
    given: dict[str, NDArray[Any]] = {
        name: array.astype(dtypes[name], copy=False) for name, array in feed.items()
    }
    try:
        found: list[NDArray[Any]] = session.run(list(outputs), given)
    except ORT_ERRORS as err:
        raise GapExportError(
            "ONNX Runtime failed while computing the unpatched graph",
            seen=f"{outputs[0]}: {_first_line(err)}",
        ) from err
    return found


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]
