"""Both LLaVAs in every form transformers has written: names, shards, dtypes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gap_export.errors import CheckpointError
from gap_export.exporting.torch_backend import TorchBackend
from gap_export.families import Reference
from tests.families import reading, rewriting
from tests.families.llava_layouts import write_state
from tests.families.tiny_llava_next import write_llava_next

HALF = {"": torch.float16}
MIXED = {
    "multi_modal_projector.": torch.float32,
    "vision_tower.": torch.bfloat16,
    "": torch.float16,
}


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def original(request, tmp_path_factory, tiny_checkpoint) -> Path:
    """A checkpoint as transformers 5 writes it, in float32."""
    if request.param == "llava":
        return tiny_checkpoint
    folder = tmp_path_factory.mktemp("next") / "llama"
    write_llava_next(folder)
    return folder


def reference(folder: Path, *, dtype: str | None = None, device: Any = "cpu") -> Reference:
    return reading.build(None, folder, device=device, dtype=dtype)


def weights(ref: Reference) -> dict[str, torch.Tensor]:
    """All that is run, by component and name."""
    found = {
        f"{component.name}.{key}": tensor
        for component in ref.components
        for key, tensor in component.module.state_dict().items()
    }
    return found | ({} if ref.newline is None else {"newline": ref.newline})


def equal(ours: Reference, theirs: Reference) -> bool:
    one, other = weights(ours), weights(theirs)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def logits(ref: Reference) -> torch.Tensor:
    """Of the last token of a prompt with an image in it, [V], as float32."""
    backend = TorchBackend(ref)
    pixels = np.random.default_rng(3).normal(size=(1, 3, 32, 32)).astype(np.float32)
    features = backend.run("vision_encoder", {"pixel_values": pixels})["image_features"]
    text = backend.run("embed_tokens", {"input_ids": np.arange(5, 12)[None]})["inputs_embeds"]
    embeds = np.concatenate([text[:, :3], features, text[:, 3:]], axis=1)
    slots = np.arange(embeds.shape[1], dtype=np.int64)[None]
    feed = {
        "inputs_embeds": embeds,
        "attention_mask": np.ones_like(slots),
        "position_ids": slots,
        "kept_positions": slots,
    }
    found = backend.decode(feed, backend.new_cache(1, slots.size))
    return torch.from_numpy(found[0].astype(np.float32))


@pytest.mark.parametrize(
    "names",
    [
        rewriting.TRANSFORMERS_4,
        rewriting.TRANSFORMERS_4_52,
        rewriting.TRANSFORMERS_5_IN_MEMORY,
    ],
    ids=["4.x", "4.52", "5-in-memory"],
)
def test_names_of_every_version_are_read_as_one(original, tmp_path, names):
    folder = rewriting.rewrite(original, tmp_path / "c", rewriting.renamed(names))
    assert equal(reference(folder), reference(original))


def test_shards_are_read_as_one_file(original, tmp_path):
    folder = rewriting.rewrite(original, tmp_path / "c", dict)
    files = rewriting.shard(folder, count=3)
    ref = reference(folder)
    assert equal(ref, reference(original))
    read = {path.name for _, path in ref.checkpoint_files}
    assert read == {file.name for file in files} | {"config.json", "generation_config.json"}


@pytest.mark.parametrize("number", [0, 2])
def test_missing_shard_is_named(original, tmp_path, number):
    folder = rewriting.rewrite(original, tmp_path / "c", dict)
    file = rewriting.shard(folder, count=3)[number]
    file.unlink()
    with pytest.raises(CheckpointError, match=file.name):
        reference(folder, device="meta")


def test_truncated_shard_is_named(original, tmp_path):
    folder = rewriting.rewrite(original, tmp_path / "c", dict)
    file = rewriting.shard(folder, count=2)[1]
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=rf"damaged.*{file.name}|{file.name}.*damaged"):
        reference(folder, device="meta")


@pytest.mark.parametrize(
    "place", ["../model.safetensors", "/etc/passwd", "sub/../../x.safetensors", 7, None, ""]
)
def test_index_that_leads_out_of_the_folder_is_refused(original, tmp_path, place):
    folder = rewriting.rewrite(original, tmp_path / "c", dict)
    rewriting.shard(folder, count=2)
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"][next(iter(index["weight_map"]))] = place
    rewriting.write_index(folder, index)
    with pytest.raises(CheckpointError, match=r"index"):
        reference(folder, device="meta")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_checkpoint_keeps_its_dtype(original, tmp_path, dtype):
    to = rewriting.cast_to({"": getattr(torch, dtype)})
    folder = rewriting.rewrite(original, tmp_path / "c", to)
    ref = reference(folder)
    assert ref.dtype == dtype
    assert {tensor.dtype for tensor in weights(ref).values()} == {getattr(torch, dtype)}
    # Bytes as they are in the file, so that an export can point at them.
    for component in reference(folder, device="meta").components:
        assert {weight.dtype for weight in component.weight_refs.values()} == {
            {"float16": "F16", "bfloat16": "BF16"}[dtype]
        }
        assert {t.dtype for t in component.outputs if t.name != "keep_indices"} == {dtype}
    # RoPE is computed in float32 in any model.
    assert ref.decoder.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dtype_casts_every_weight(original, tmp_path, dtype):
    folder = rewriting.rewrite(original, tmp_path / "c", rewriting.cast_to(HALF))
    ref, own = reference(folder, dtype=dtype), weights(reference(folder))
    assert ref.dtype == dtype
    for key, tensor in weights(ref).items():
        assert torch.equal(tensor, own[key].to(getattr(torch, dtype))), key


@pytest.mark.parametrize(("dtype", "share"), [("float16", 0.01), ("bfloat16", 0.08)])
def test_it_computes_in_its_dtype(original, tmp_path, dtype, share):
    to = rewriting.cast_to({"": getattr(torch, dtype)})
    folder = rewriting.rewrite(original, tmp_path / "c", to)
    wanted, found = logits(reference(folder, dtype="float32")), logits(reference(folder))
    difference = (found - wanted).abs().max()
    assert 0 < difference < share * wanted.abs().max()


def test_model_has_the_dtype_of_most_of_its_decoder(original, tmp_path):
    folder = rewriting.rewrite(original, tmp_path / "c", rewriting.cast_to(MIXED))
    ref = reference(folder)
    assert ref.dtype == "float16"
    assert {tensor.dtype for tensor in weights(ref).values()} == {torch.float16}
    found = {w.dtype for c in ref.components for w in c.weight_refs.values()}
    assert found == {"F32", "BF16", "F16"}


def test_value_that_overflows_the_dtype_is_refused(original, tmp_path):
    def spoil(tensors: rewriting.Tensors) -> rewriting.Tensors:
        tensors["language_model.model.norm.weight"][0] = 1e6
        return tensors

    folder = rewriting.rewrite(original, tmp_path / "c", spoil)
    assert reference(folder).dtype == "float32"
    with pytest.raises(CheckpointError, match=r"not fit float16.*model\.norm\.weight.*65504"):
        reference(folder, dtype="float16")


def test_newline_that_overflows_the_dtype_is_refused(tmp_path):
    def spoil(tensors: rewriting.Tensors) -> rewriting.Tensors:
        tensors["image_newline"][0] = -1e6
        return tensors

    write_llava_next(tmp_path / "original")
    folder = rewriting.rewrite(tmp_path / "original", tmp_path / "c", spoil)
    ref = reference(folder, dtype="float16")
    with pytest.raises(CheckpointError, match=r"not fit float16.*image_newline"):
        _ = ref.newline


@pytest.mark.parametrize("form", ["bin", "bin-sharded"])
def test_pickles_are_read_like_safetensors(original, tmp_path, form):
    folder = rewriting.rewrite(original, tmp_path / "c", dict)
    file = folder / "model.safetensors"
    write_state(folder, load_file(file), form)
    file.unlink()
    ref = reference(folder)
    assert equal(ref, reference(original))
    assert {p.suffix for _, p in ref.checkpoint_files if p.name.startswith("pytorch")} == {".bin"}
