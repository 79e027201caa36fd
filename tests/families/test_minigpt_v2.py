"""MiniGPT-v2 in its published layout, against a plain forward from the definitions."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.checkpoint.weights import DerivedWeight
from gap_export.errors import CheckpointError, RecipeError, UnsupportedPrunerError
from gap_export.families import (
    Reference,
    build_reference,
    find_family,
    load_builder,
    read_source,
    resolve_pruning,
    supported_pruners,
)
from gap_export.pruning import PRESETS
from gap_export.runtime.prompt import PromptEncoder
from gap_export.spec.manifest import GridSpec
from gap_export.spec.positions import VisualSpan, build_kept_positions
from gap_export.spec.recipe import Recipe
from gap_export.spec.requests import PruningRequest
from tests.families.llava_layouts import State
from tests.families.masked_oracle import (
    check_masked_oracle,
    logits_of_every_token,
    spliced,
    torch_decoder,
)
from tests.families.reading import build, refusal
from tests.families.tiny_minigpt_v2 import (
    LLAMA,
    SIDE,
    WIDTH,
    TinyMiniGpt,
    llama_by_hand,
    make_minigpt,
    minigpt_recipe,
    tokens_by_hand,
    write_base,
    write_parts,
    write_trained,
)

ATOL = 1e-4
NUM_VISUAL = 16
DEFAULT_NORM = {"ln_vision.weight": torch.ones(WIDTH), "ln_vision.bias": torch.zeros(WIDTH)}
ADAPTER = "llama_model.base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"


@pytest.fixture(scope="module")
def made() -> TinyMiniGpt:
    return make_minigpt()


@pytest.fixture
def tiny(made: TinyMiniGpt) -> TinyMiniGpt:
    """One whose dicts a test may change."""
    return dataclasses.replace(
        made, trained=dict(made.trained), base=dict(made.base), eva=dict(made.eva)
    )


@pytest.fixture(scope="module")
def shared_parts(made: TinyMiniGpt, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Read only."""
    return write_parts(tmp_path_factory.mktemp("minigpt"), made)


@pytest.fixture
def parts(tiny: TinyMiniGpt, tmp_path: Path) -> dict[str, Path]:
    return write_parts(tmp_path, tiny)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return minigpt_recipe()


def images(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 4 * SIDE, 4 * SIDE, generator=torch.Generator().manual_seed(3))


def assert_all_logits_equal(
    tiny: TinyMiniGpt, reference: Reference, ln_vision: State = DEFAULT_NORM
) -> None:
    model = llama_by_hand(tiny)
    table = model.get_input_embeddings().weight
    # Two times <s>, then words around the image.
    before, after = [1, 1, 20, 14], [40, 9, 12, 25, 31]
    with torch.inference_mode():
        visual = tokens_by_hand(tiny.eva, images(), ln_vision)[0]
        visual = visual @ tiny.trained["llama_proj.weight"].T + tiny.trained["llama_proj.bias"]
        full = torch.cat((table[before], visual, table[after]))[None]
        wanted = model(inputs_embeds=full).logits[0]
        ours = reference.vision_encoder(images())[0][0]
        assert (ours - visual).abs().max() < ATOL
        words = reference.embed_tokens(torch.tensor([before + after]))[0]
        mine = torch.cat((words[:4], ours, words[4:]))[None]
    assert wanted.abs().max() > 0.5
    assert np.abs(logits_of_every_token(reference, mine.numpy()) - wanted.numpy()).max() < ATOL


def test_logits_of_all_tokens_equal_a_plain_forward(made, recipe, shared_parts):
    source = read_source(recipe, Checkpoint(parts=shared_parts))
    assert (source.layout, source.dtype) == ("minigpt-v2", "float32")
    assert source.eos_token_ids == (2,) and source.image_token_id is None
    assert {role for role, _ in source.files} == {"main", "base", "tower"}
    assert {k: w.shape for k, w in source.weights.items()} == load_builder(
        find_family(recipe)
    ).expected_tensors(recipe.architecture)
    assert_all_logits_equal(made, build(recipe, shared_parts))


@pytest.mark.parametrize("rank", [1, 8])
def test_scale_follows_the_rank(recipe, tmp_path, rank):
    tiny = make_minigpt(rank=rank)
    assert_all_logits_equal(tiny, build(recipe, write_parts(tmp_path, tiny)))


def test_published_rank_has_a_scale_of_a_quarter(made, recipe, shared_parts):
    weights = read_source(recipe, Checkpoint(parts=shared_parts)).weights
    down, up = (made.trained[ADAPTER.replace("lora_B", f"lora_{half}")] for half in "AB")
    assert down.shape[0] == 64
    wanted = made.base["model.layers.1.self_attn.v_proj.weight"] + 0.25 * up @ down
    assert (weights["decoder.layers.1.self_attn.v_proj.weight"].load() - wanted).abs().max() < 1e-6
    assert not isinstance(weights["decoder.layers.1.self_attn.k_proj.weight"], DerivedWeight)


def test_stored_ln_vision_is_used(tiny, recipe, parts):
    generator = torch.Generator().manual_seed(9)
    norm = {key: tensor + torch.randn(WIDTH, generator=generator) for key, tensor in
            DEFAULT_NORM.items()}  # fmt: skip
    write_trained(parts["main"], {**tiny.trained, **norm})
    assert_all_logits_equal(tiny, build(recipe, parts), norm)
    del norm["ln_vision.bias"]
    write_trained(parts["main"], {**tiny.trained, **norm})
    assert "missing ln_vision.bias" in refusal(recipe, parts)


def test_newer_peft_names_and_a_bare_state_dict_are_read(tiny, recipe, parts):
    newer = {
        key.replace(".weight", ".default.weight") if "lora" in key else key: tensor
        for key, tensor in tiny.trained.items()
    }
    write_trained(parts["main"], newer)
    assert_all_logits_equal(tiny, build(recipe, parts))
    torch.save(newer, parts["main"])
    read_source(recipe, Checkpoint(parts=parts))
    write_trained(parts["main"], {**newer, **tiny.trained})
    assert "two names for one tensor" in refusal(recipe, parts)


def test_model_has_the_base_models_dtype(tiny, recipe, parts, tmp_path):
    halves = {key: tensor.half() for key, tensor in tiny.base.items()}
    parts["base"] = write_base(tmp_path / "half", halves, form="bin")
    source = read_source(recipe, Checkpoint(parts=parts))
    assert source.dtype == "float16"
    merged = source.weights["decoder.layers.1.self_attn.v_proj.weight"].load()
    down, up = (tiny.trained[ADAPTER.replace("lora_B", f"lora_{half}")] for half in "AB")
    base = halves["model.layers.1.self_attn.v_proj.weight"].float()
    assert merged.dtype == torch.float16
    assert (merged - (base + 0.25 * up @ down)).abs().max() < 2e-3
    reference = build(recipe, parts)
    with torch.inference_mode():
        features, _, *_ = reference.vision_encoder(images())
    assert features.dtype == torch.float16 and torch.isfinite(features).all()


def test_meta_reference_loads_no_weight(recipe, shared_parts, monkeypatch):
    def forbidden(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(DerivedWeight, "load", forbidden)
    monkeypatch.setattr("gap_export.checkpoint.weights.safetensors.map_bytes", forbidden)
    for component in build(recipe, shared_parts, device="meta").components:
        assert all(parameter.is_meta for parameter in component.module.parameters())
        assert set(component.weight_refs) == set(component.module.state_dict())


@pytest.mark.parametrize("pruner", ["cls", "fastervlm", "spatial", "random"])
def test_masked_oracle_holds(recipe, shared_parts, pruner):
    every, pruned = build(recipe, shared_parts), build(recipe, shared_parts, pruner, 0.3)
    with torch.inference_mode():
        visual, _, *_ = every.vision_encoder(images())
        features, keep, *_ = pruned.vision_encoder(images())
    assert (features[0] - visual[0, keep[0]]).abs().max() < 1e-5
    full = spliced(every, visual[0].numpy(), before=4, after=6)
    span = VisualSpan(start=4, num_visual_tokens=NUM_VISUAL, keep_indices=keep[0].numpy())
    table = build_kept_positions(unpruned_length=full.shape[1], spans=[span])
    check_masked_oracle(every, torch_decoder(every), full, table, steps=5)


def test_pruners_that_read_text_are_refused(recipe):
    reading = {"text", "trim", "cdpruner", "litelvlm"}
    # These look at the layer behind the one whose features are read; here that is the last.
    merging = {"prumerge", "prumerge+", "prumerge-select"}
    assert set(supported_pruners(recipe)) == set(PRESETS) - reading - merging
    with pytest.raises(UnsupportedPrunerError, match="text"):
        resolve_pruning(recipe, PruningRequest(pruner="text", keep_ratio=0.3, order="raster"))


def test_random_weights_need_no_checkpoint(recipe):
    pruning = resolve_pruning(
        recipe, PruningRequest(pruner="fastervlm", keep_ratio=0.5, order="raster")
    )
    reference = build_reference(
        recipe, Checkpoint(parts={}, random_seed=4), pruning, device="cpu", dtype="float32"
    )
    with torch.inference_mode():
        features, keep, *_ = reference.vision_encoder(images(2))
    assert features.shape == (2, 8, 32) and keep.shape == (2, 8)
    assert torch.isfinite(features).all() and features.std() > 0


# --- refusals -------------------------------------------------------------------------------------


def test_recipe_must_say_sizes_and_end(recipe, parts):
    with pytest.raises(RecipeError, match="does not say the model's sizes"):
        read_source(recipe.model_copy(update={"architecture": None}), Checkpoint(parts=parts))
    with pytest.raises(RecipeError, match="does not say what ends an answer"):
        read_source(recipe.model_copy(update={"end_of_answer": ()}), Checkpoint(parts=parts))


def test_square_grid_is_refused(recipe, parts):
    """16 x 16 instead of 32 x 8, the slip that is easiest to make."""
    square = recipe.model_copy(update={"grid": GridSpec(rows=4, cols=4)})
    with pytest.raises(CheckpointError, match=r"visual token grid .*: \[8, 2\]; allowed: \[4, 4\]"):
        build(square, parts)


@pytest.mark.parametrize("width", [WIDTH * 3, WIDTH * 4 + 1, 8])
def test_projector_that_takes_no_whole_patches_of_a_row_is_refused(recipe, width):
    sizes = recipe.architecture
    odd = dataclasses.replace(sizes, projector=dataclasses.replace(sizes.projector, width=width))
    with pytest.raises(RecipeError, match="whole patches of one row"):
        load_builder(find_family(recipe)).expected_tensors(odd)


def test_unknown_and_missing_tensors_of_the_trained_part_are_refused(tiny, recipe, parts):
    write_trained(parts["main"], {**tiny.trained, "Qformer.weight": torch.ones(2)})
    assert "unexpected Qformer.weight" in refusal(recipe, parts)
    write_trained(parts["main"], {k: t for k, t in tiny.trained.items() if k != ADAPTER})
    message = refusal(recipe, parts)
    assert f"missing {ADAPTER}" in message and "in the recipe" in message
    write_trained(parts["main"], {**tiny.trained, ADAPTER: torch.ones(32, 5)})
    assert f"{ADAPTER} [32, 5] instead of [32, 64]" in refusal(recipe, parts)
    projector = {k: t for k, t in tiny.trained.items() if "llama_proj" in k}
    write_trained(parts["main"], projector)
    assert "holds no LoRA adapter" in refusal(recipe, parts)


def test_file_of_something_else_is_no_checkpoint_of_this_family(recipe, parts, tiny_checkpoint):
    message = refusal(recipe, {**parts, "main": parts["tower"]})
    assert "is not a checkpoint of family minigpt_v2" in message and "eva_vit_g.pth" in message
    other = recipe.checkpoint.parts["main"].model_copy(update={"file": None})
    source = recipe.checkpoint.model_copy(
        update={"parts": {**recipe.checkpoint.parts, "main": other}}
    )
    folder = recipe.model_copy(update={"checkpoint": source})
    assert "llava-hf" in refusal(folder, {**parts, "main": tiny_checkpoint})


def test_trained_part_as_tower_is_refused(recipe, parts):
    message = refusal(recipe, {**parts, "tower": parts["main"]})
    assert "missing blocks.0." in message and "unexpected llama_model" in message


def test_truncated_and_missing_files_are_refused(recipe, parts):
    whole = parts["tower"].read_bytes()
    parts["tower"].write_bytes(whole[: len(whole) // 2])
    assert "eva_vit_g.pth" in refusal(recipe, parts)
    parts["tower"].unlink()
    assert "eva_vit_g.pth" in refusal(recipe, parts)
    whole = parts["main"].read_bytes()
    parts["main"].write_bytes(whole[: len(whole) // 2])
    del parts["tower"]
    assert "tower" in refusal(recipe, parts)


def test_truncated_trained_part_is_damaged_and_not_of_another_family(recipe, parts):
    whole = parts["main"].read_bytes()
    parts["main"].write_bytes(whole[: len(whole) // 2])
    assert "damaged" in refusal(recipe, parts)


@pytest.mark.parametrize(
    ("key", "value", "seen"),
    [
        ("hidden_size", 40, "hidden_size 40"),
        ("num_hidden_layers", 3, "num_layers 3"),
        ("num_key_value_heads", 2, "num_key_value_heads 2"),
        ("vocab_size", 130, "vocab_size 130"),
    ],
)
def test_base_of_another_size_is_refused(recipe, parts, tmp_path, key, value, seen):
    from transformers import LlamaConfig, LlamaForCausalLM

    state = LlamaForCausalLM(LlamaConfig(**{**LLAMA, key: value})).state_dict()
    parts["base"] = write_base(tmp_path / "other", state, **{key: value})
    message = refusal(recipe, parts)
    assert "is not the base model of tiny-minigpt" in message and seen in message
    assert "Llama-2-7b-chat" in message


def test_llava_as_base_is_refused(recipe, parts, tiny_checkpoint):
    assert "model_type 'llava'" in refusal(recipe, {**parts, "base": tiny_checkpoint})


# --- the prompt -----------------------------------------------------------------------------------


def test_prompt_begins_twice(recipe, shared_parts, sample_manifest, tmp_path):
    """The template's <s> on top of the tokenizer's own, as in training."""
    source = read_source(recipe, Checkpoint(parts=shared_parts))
    tokenizer = source.tokenizer
    content = tokenizer.read_bytes() if isinstance(tokenizer, Path) else tokenizer
    (tmp_path / "tokenizer.json").write_bytes(content)
    decoder = dataclasses.replace(sample_manifest.decoder, max_position_embeddings=4096)
    manifest = dataclasses.replace(sample_manifest, prompt=recipe.prompt, decoder=decoder)
    encoded = PromptEncoder(manifest, tmp_path).encode("the small red circle")
    assert encoded.prefix_ids[:2].tolist() == [1, 1]
    assert 1 not in encoded.prefix_ids[2:] and 1 not in encoded.suffix_ids
    shorter = PromptEncoder(manifest, tmp_path).encode("the circle")
    assert len(shorter.prefix_ids) == len(encoded.prefix_ids)
    assert len(shorter.suffix_ids) == len(encoded.suffix_ids) - 2
