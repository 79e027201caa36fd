"""Which weights are taken as they lie, and which are converted."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gap_export.bundle import write_bundle
from gap_export.exporting.place_weights import place_weights
from gap_export.progress import SilentProgress
from tests.exporting.references import reference_of


def place(folder: Path, out: Path, *, hold: str = "link", **options):
    """The places of all components' weights, by component and key; ``out`` holds the files."""
    reference = reference_of(folder, **options)
    with write_bundle(out) as draft:
        placed = place_weights(draft, reference, hold=hold, progress=SilentProgress())
        places = {c.name: placed.of(c.weight_refs) for c in reference.components}
        kept = out.parent / "kept"
        # Copies of links are links' bytes; what counts is where the draft had them from.
        inodes = {p.name: p.stat().st_ino for p in draft.folder.iterdir()}
        shutil.copytree(draft.folder, kept)
    return reference, places, kept, inodes


def read(folder: Path, place) -> np.ndarray:
    dtype = {"F32": np.float32, "F16": np.float16}[place.dtype]
    raw = (folder / place.location).read_bytes()[place.offset : place.offset + place.length]
    return np.frombuffer(raw, dtype).reshape(place.shape)


def assert_places_hold_the_weights(reference, places, folder, dtype):
    for component in reference.components:
        for key, weight in component.weight_refs.items():
            place = places[component.name][key]
            expected = weight.load().to(dtype).numpy()
            np.testing.assert_array_equal(read(folder, place), expected, err_msg=key)


def test_weights_of_the_right_dtype_are_the_users_own_file(tiny_checkpoint, tmp_path):
    reference, places, kept, inodes = place(tiny_checkpoint, tmp_path / "b")
    source = tiny_checkpoint / "model.safetensors"
    assert set(inodes) == {"model.safetensors"}
    assert inodes["model.safetensors"] == source.stat().st_ino
    assert_places_hold_the_weights(reference, places, kept, torch.float32)


def test_copied_weights_are_another_file_of_the_same_bytes(tiny_checkpoint, tmp_path):
    _, _, kept, inodes = place(tiny_checkpoint, tmp_path / "b", hold="copy")
    source = tiny_checkpoint / "model.safetensors"
    assert inodes["model.safetensors"] != source.stat().st_ino
    assert (kept / "model.safetensors").read_bytes() == source.read_bytes()


def test_files_of_one_name_get_two(tiny_checkpoint, tmp_path):
    reference, places, kept, inodes = place(tiny_checkpoint, tmp_path / "b", pruner="text")
    assert set(inodes) == {
        "model.safetensors",
        "clip-model.safetensors",
        "visual_projection.safetensors",
    }
    assert_places_hold_the_weights(reference, places, kept, torch.float32)


def test_another_dtype_is_written_once_and_nothing_is_linked(tiny_checkpoint, tmp_path):
    reference, places, kept, inodes = place(tiny_checkpoint, tmp_path / "b", dtype="float16")
    assert set(inodes) == {"converted.safetensors"}
    assert_places_hold_the_weights(reference, places, kept, torch.float16)
    with safe_open(kept / "converted.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}  # noqa: SIM118


def test_only_what_differs_is_converted(tiny_checkpoint, tmp_path):
    """A float16 model whose projector is float32: the projector alone is written."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "mixed"))
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v if "projector" in k else v.half() for k, v in tensors.items()},
        folder / "model.safetensors",
    )
    reference, places, kept, inodes = place(folder, tmp_path / "b")
    assert reference.dtype == "float16"
    assert inodes["model.safetensors"] == (folder / "model.safetensors").stat().st_ino
    with safe_open(kept / "converted.safetensors", "pt") as file:
        assert sorted(file.keys()) == [
            f"vision_encoder.projector.linear_{n}.{part}"
            for n in (1, 2)
            for part in ("bias", "weight")
        ]
    assert_places_hold_the_weights(reference, places, kept, torch.float16)


def test_a_weight_two_graphs_share_is_stored_once(make_checkpoint, tmp_path):
    folder = make_checkpoint(tie_word_embeddings=True)
    _, places, _, _ = place(folder, tmp_path / "b", dtype="float16")
    embedding = places["embed_tokens"]["weight"]
    assert places["decoder_model_merged"]["lm_head.weight"] == embedding


def test_a_tensor_that_does_not_fit_the_dtype_leaves_nothing(tiny_checkpoint, tmp_path):
    from gap_export.errors import CheckpointError

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "large"))
    tensors = load_file(folder / "model.safetensors")
    key = next(k for k in tensors if k.endswith("linear_1.weight"))
    tensors[key][0, 0] = 1e6
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"linear_1\.weight"):
        place(folder, tmp_path / "out" / "b", dtype="float16")
    assert not (tmp_path / "out").exists()
