"""Checkpoints of Qwen's models: names old and new, true sizes, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.checkpoint.weights import DerivedWeight, TensorRef
from gap_export.families import build_reference, read_source, resolve_pruning
from gap_export.families.common.checkpoints.random_weights import stand_in_tokenizer
from gap_export.families.common.reference import ModelSource
from gap_export.spec.recipe import find_recipe, load_recipe
from gap_export.spec.requests import PruningRequest
from tests.families.qwen_vl.tiny import SPECIAL, make_tiny
from tests.families.reading import refusal, write_empty

KEYS = Path(__file__).parent / "keys"
# What is computed: the frames of a patch added, the table of positions interpolated.
DERIVED = {
    "tower.embeddings.patch_embedding.weight",
    "tower.embeddings.position_embedding.weight",
}


def source_of(folder: Path) -> ModelSource:
    return read_source(load_recipe(folder / "recipe.yaml"), Checkpoint.of(folder))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "config.json"
    plain = json.loads(file.read_text())
    change(plain)
    file.write_text(json.dumps(plain))


def test_names_old_and_new_give_the_same_tensors_and_facts(tiny, tmp_path):
    ours = source_of(tiny.folder)
    theirs = source_of(make_tiny(tiny.family, tmp_path / "new", old_names=False).folder)
    assert ours.layout == theirs.layout == tiny.family.replace("_", "-")
    assert ours.weights.keys() == theirs.weights.keys()
    for key, weight in ours.weights.items():
        assert torch.equal(weight.load(), theirs.weights[key].load()), key
    assert ours.architecture == theirs.architecture
    assert ours.eos_token_ids == (SPECIAL["<|im_end|>"], SPECIAL["<|endoftext|>"])
    assert ours.image_token_id == SPECIAL["<|image_pad|>"]


def test_what_transformers_saves_is_read(tiny, tmp_path):
    """config.json and names as its newest version writes them."""
    saved = make_tiny(tiny.family, tmp_path / "saved").folder
    (saved / "model.safetensors").unlink()
    tiny.model.save_pretrained(saved)
    ours, theirs = source_of(tiny.folder), source_of(saved)
    assert ours.architecture == theirs.architecture
    for key, weight in ours.weights.items():
        assert torch.equal(weight.load(), theirs.weights[key].load()), key


def test_only_what_depends_on_the_canvas_is_computed(tiny):
    weights = source_of(tiny.folder).weights
    computed = {key for key, weight in weights.items() if isinstance(weight, DerivedWeight)}
    assert computed == DERIVED & weights.keys()
    assert all(isinstance(weights[key], TensorRef) for key in weights.keys() - computed)


def test_a_head_that_is_the_embeddings_is_left_out(tiny, tmp_path):
    folder = make_tiny(tiny.family, tmp_path / "tied", tied=True).folder
    source = source_of(folder)
    assert source.architecture.decoder.tied_embeddings
    assert source.weights["lm_head.weight"] is source.weights["decoder.embed_tokens.weight"]
    edit(folder, lambda plain: plain.update(tie_word_embeddings=False))
    recipe = load_recipe(folder / "recipe.yaml")
    assert "missing lm_head.weight" in refusal(recipe, folder)


def _rope(plain: dict[str, Any]) -> dict[str, Any]:
    text: dict[str, Any] = plain.get("text_config", plain)
    return text["rope_scaling"]


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "linear", "llama3", "longrope", "nonsense"])
def test_rope_with_scaling_is_refused_by_its_name(writable, kind):
    def change(plain: dict[str, Any]) -> None:
        _rope(plain).pop("rope_type", None)
        _rope(plain)["type"] = kind

    edit(writable.folder, change)
    said = refusal(load_recipe(writable.folder / "recipe.yaml"), writable.folder)
    assert f"rope_scaling: RoPE of type cannot be used: {kind!r}; allowed: mrope or default" in said


def test_rope_that_is_plain_by_one_name_and_scaled_by_the_other_is_refused(writable):
    edit(writable.folder, lambda plain: _rope(plain).update(type="yarn", rope_type="default"))
    said = refusal(load_recipe(writable.folder / "recipe.yaml"), writable.folder)
    assert "RoPE of type cannot be used: 'yarn'" in said


@pytest.mark.parametrize("kind", ["mrope", "default"])
def test_either_name_of_rope_without_scaling_is_read(writable, kind):
    edit(writable.folder, lambda plain: _rope(plain).update(type=kind, rope_type=kind))
    source_of(writable.folder)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "sections of another head": (
        lambda plain: _rope(plain).update(mrope_section=[1, 1, 1]),
        "mrope_section cannot be used: [1, 1, 1]; allowed: 3 numbers that add up to",
    ),
    "two sections": (
        lambda plain: _rope(plain).update(mrope_section=[4, 4]), "mrope_section cannot be used"
    ),
    "no sections": (
        lambda plain: _rope(plain).pop("mrope_section"), "mrope_section cannot be used: None"
    ),
    "another merger": (
        lambda plain: plain["vision_config"].update(
            {"hidden_size": 32} if plain["model_type"] == "qwen2_vl" else {"out_hidden_size": 32}
        ),
        "the merger's width in vision_config cannot be used: 32",
    ),
    "no heads": (lambda plain: plain["vision_config"].update(num_heads=0), "num_heads"),
    "heads that do not divide": (
        lambda plain: plain["vision_config"].update(num_heads=3), "num_heads cannot be used: 3"
    ),
    "a list of patches": (
        lambda plain: plain["vision_config"].update(patch_size=[4, 4]), "patch_size"
    ),
    "another base of the tower's RoPE": (
        lambda plain: plain["vision_config"].update(rope_theta=777.0),
        "rope_theta of vision_config cannot be used: 777.0; allowed: 10000",
    ),
    "another RoPE in the tower": (
        lambda plain: plain["vision_config"].update(
            rope_parameters={"rope_type": "linear", "factor": 2.0}
        ),
        "rope_type of vision_config cannot be used: 'linear'",
    ),
    "too many layers": (
        lambda plain: plain["vision_config"].update(depth=100_000), "vision_config.depth"
    ),
    "another depth": (
        lambda plain: plain["vision_config"].update(depth=5, fullatt_block_indexes=[1, 4]),
        "missing tower.encoder.layers.4",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_does_not_fit_is_refused(writable, change, words):
    edit(writable.folder, change)
    assert words in refusal(load_recipe(writable.folder / "recipe.yaml"), writable.folder)


@pytest.mark.parametrize("full", [[1], [], [1, 4], ["3"]], ids=str)
def test_windows_in_the_last_layer_are_refused(tmp_path, full):
    tiny = make_tiny("qwen2_5_vl", tmp_path / "c")
    edit(tiny.folder, lambda plain: plain["vision_config"].update(fullatt_block_indexes=full))
    assert refusal(load_recipe(tiny.folder / "recipe.yaml"), tiny.folder)


@pytest.mark.parametrize("taps", [[2, 0], [0, 0], [0, 9], [-1]], ids=str)
def test_taps_that_are_no_layers_are_refused(tmp_path, taps):
    tiny = make_tiny("qwen3_vl", tmp_path / "c")
    edit(tiny.folder, lambda plain: plain["vision_config"].update(deepstack_visual_indexes=taps))
    said = refusal(load_recipe(tiny.folder / "recipe.yaml"), tiny.folder)
    assert "deepstack_visual_indexes cannot be used" in said


def test_a_folder_that_says_no_end_of_answer_is_refused(tmp_path):
    folder = make_tiny("qwen3_vl", tmp_path / "c").folder
    edit(folder, lambda plain: plain["text_config"].pop("eos_token_id"))
    source_of(folder)
    (folder / "generation_config.json").unlink()
    assert "no usable eos_token_id" in refusal(load_recipe(folder / "recipe.yaml"), folder)


def test_a_tap_or_a_tower_s_tensor_too_many_is_refused(tmp_path):
    tiny = make_tiny("qwen3_vl", tmp_path / "c")
    file = tiny.folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.visual.deepstack_merger_list.2.norm.weight"] = torch.ones(128)
    save_file(tensors, file)
    recipe = load_recipe(tiny.folder / "recipe.yaml")
    assert "deepstack_merger_list.2.norm.weight" in refusal(recipe, tiny.folder)


def test_another_family_s_recipe_says_whose_the_checkpoint_is(tiny_of):
    recipe = load_recipe(tiny_of("qwen2_5_vl").folder / "recipe.yaml")
    said = refusal(recipe, tiny_of("qwen2_vl").folder)
    assert "looks like qwen2_vl" in said


# Of one that reasons, and of one that does not: reasoning in earlier turns is no sign of it.
REASONS = r"{% if add_generation_prompt %}{{ 'assistant\n<think>\n' }}{% endif %}"
ANSWERS = (
    r"{{ '<think>' + m.reasoning }}{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
)


def write_template(file: Path, template: str) -> None:
    token = {"151667": {"content": "<think>", "special": False}}
    plain = {"chat_template": template, "added_tokens_decoder": token}
    file.write_text(template if file.suffix == ".jinja" else json.dumps(plain))


@pytest.mark.parametrize(
    "name", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"]
)
def test_a_thinking_variant_is_read_with_a_warning_and_others_without(tmp_path, name):
    tiny = make_tiny("qwen3_vl", tmp_path / "c")
    assert source_of(tiny.folder).notes == ()
    write_template(tiny.folder / name, ANSWERS)
    assert source_of(tiny.folder).notes == ()
    write_template(tiny.folder / name, REASONS)
    (note,) = source_of(tiny.folder).notes
    assert "thinking variant" in note and "max_new_tokens" in note


def listed_keys(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a file, ``{0..23}`` being each of these numbers."""
    for line in (KEYS / f"{name}.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        key, *sizes = line.split()
        layers = re.search(r"\{(\d+)\.\.(\d+)\}", key)
        numbers = range(int(layers[1]), int(layers[2]) + 1) if layers else [0]
        for number in numbers:
            yield re.sub(r"\{.*\}", str(number), key), tuple(map(int, sizes))


# config.json as published, but for what is not read.
TEXT = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "vocab_size": 151936}
MROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "qwen2-vl-2b": (
        2_208_985_600,
        {
            "model_type": "qwen2_vl", **TEXT, "tie_word_embeddings": True, "hidden_size": 1536,
            "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
            "num_key_value_heads": 2, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
            "rope_scaling": MROPE, "use_sliding_window": False, "sliding_window": 32768,
            "max_window_layers": 28,
            "vision_config": {
                "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3,
                "hidden_size": 1536, "patch_size": 14, "spatial_merge_size": 2,
                "spatial_patch_size": 14, "temporal_patch_size": 2,
            },
        },
    ),
    "qwen2.5-vl-3b": (
        3_754_622_976,
        {
            "model_type": "qwen2_5_vl", **TEXT, "tie_word_embeddings": True, "hidden_size": 2048,
            "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 2, "max_position_embeddings": 128000, "rope_theta": 1000000.0,
            "rope_scaling": MROPE, "use_sliding_window": False, "sliding_window": 32768,
            "max_window_layers": 70,
            "vision_config": {
                "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
                "num_heads": 16, "in_chans": 3, "out_hidden_size": 2048, "patch_size": 14,
                "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
                "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
                "temporal_patch_size": 2,
            },
        },
    ),
    "qwen3-vl-4b": (
        4_437_815_808,
        {
            "model_type": "qwen3_vl", "tie_word_embeddings": True, "image_token_id": 151655,
            "text_config": {
                "model_type": "qwen3_vl_text", **TEXT, "hidden_size": 2560, "head_dim": 128,
                "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
                "num_key_value_heads": 8, "max_position_embeddings": 262144,
                "attention_bias": False, "rope_theta": 5000000, "tie_word_embeddings": True,
                "rope_scaling": {
                    "mrope_interleaved": True, "mrope_section": [24, 20, 20],
                    "rope_type": "default",
                },
            },
            "vision_config": {
                "model_type": "qwen3_vl", "depth": 24, "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "in_channels": 3,
                "num_position_embeddings": 2304, "out_hidden_size": 2560, "patch_size": 16,
                "spatial_merge_size": 2, "temporal_patch_size": 2,
                "deepstack_visual_indexes": [5, 11, 17],
            },
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes_are_read_at_true_size(name, tmp_path):
    recipe, keys = find_recipe(name)[0], dict(listed_keys(name))
    number, config = PUBLISHED[name]
    assert sum(map(math.prod, keys.values())) == number
    write_empty(tmp_path / "model.safetensors", keys)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = stand_in_tokenizer(151936, dict(recipe.special_tokens))
    (tmp_path / "tokenizer.json").write_bytes(tokenizer)
    source = read_source(recipe, Checkpoint.of(tmp_path))
    # The recipe says the same sizes: random weights are of the true shape.
    assert source.architecture == recipe.architecture
    assert source.dtype == "bfloat16"
    pruning = resolve_pruning(recipe, PruningRequest(keep_ratio=0.3))
    reference = build_reference(recipe, Checkpoint.of(tmp_path), pruning, device="meta")
    assert reference.decoder_spec.position_axes == 3
    assert reference.decoder_spec.eos_token_ids == (151645, 151643)
    # The head is the embeddings.
    assert len(source.weights) == len(keys) + 1
