"""LLaVA trained with LoRA: adapters, base and tower, against transformers' LLaVA merged by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.checkpoint.weights import TensorRef
from gap_export.families import read_source
from gap_export.spec.recipe import Recipe
from tests.families.llava_layouts import (
    LINEARS,
    Pieces,
    State,
    edit_json,
    make_adapters,
    merged,
    under,
    with_parts,
    write_base,
    write_clip,
    write_lora,
)
from tests.families.reading import build, refusal
from tests.families.test_llava_original import assert_all_logits_equal


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    return with_parts(tiny_recipe)


@pytest.fixture
def parts(tmp_path: Path, pieces: Pieces) -> dict[str, Path]:
    """A whole LoRA checkpoint of rank 4, alpha 8."""
    return {
        "main": write_lora(tmp_path / "m", pieces, make_adapters(pieces, rank=4)),
        "base": write_base(tmp_path / "base", pieces),
        "tower": write_clip(tmp_path / "clip", pieces),
    }


def merged_model(theirs: Any, pieces: Pieces, adapters: State, scale: float) -> Any:
    """Transformers' LLaVA with the adapters added by plain torch."""
    model = copy.deepcopy(theirs)
    state = merged(pieces.language, adapters, scale)
    model.lm_head.weight.data = state.pop("lm_head.weight")
    model.model.language_model.load_state_dict(
        {key.removeprefix("model."): tensor for key, tensor in state.items()}
    )
    return model


@pytest.mark.parametrize(
    ("rank", "options", "scale"),
    [
        (4, {"lora_alpha": 8}, 2.0),
        (4, {"lora_alpha": 8, "form": "safetensors", "infix": ".default"}, 2.0),
        (9, {"lora_alpha": 3, "r": 9, "use_rslora": True, "prefix": ""}, 1.0),
        (2, {"lora_alpha": 1.5, "r": 2, "prefix": "model.", "use_rslora": False}, 0.75),
        (4, {"target_modules": ["q_proj", "mlp.up_proj"]}, 2.0),
        (4, {"target_modules": ["lm_head", "v_proj"], "lora_bias": False}, 2.0),
    ],
)
def test_all_logits_equal_transformers_merged(
    tmp_path, recipe, theirs, pieces, rank, options, scale
):
    targets = options.get("target_modules", LINEARS)
    adapters = make_adapters(
        pieces, rank=rank, targets=tuple(name.rpartition(".")[2] for name in targets)
    )
    parts = {
        "main": write_lora(tmp_path / "m", pieces, adapters, **options),
        "base": write_base(tmp_path / "base", pieces, form="bin-sharded"),
        "tower": write_clip(tmp_path / "clip", pieces),
    }
    ref = build(recipe, parts)
    assert_all_logits_equal(ref, merged_model(theirs, pieces, adapters, scale))
    with pytest.raises(AssertionError, match="assert"):
        assert_all_logits_equal(ref, theirs)


def test_source_names_its_layout_files_and_tokenizer(recipe, parts):
    source = read_source(recipe, Checkpoint(parts=parts))
    assert source.layout == "llava-lora"
    assert source.tokenizer == parts["base"] / "tokenizer.json"
    assert {(role, file.name) for role, file in source.files} == {
        ("main", "config.json"), ("main", "adapter_config.json"), ("main", "adapter_model.bin"),
        ("main", "non_lora_trainables.bin"), ("base", "config.json"),
        ("base", "model.safetensors"), ("tower", "config.json"), ("tower", "model.safetensors"),
    }  # fmt: skip


def test_merge_keeps_the_dtype_of_the_base(tmp_path, recipe, parts, pieces):
    pieces.language = {key: tensor.half() for key, tensor in pieces.language.items()}
    parts["base"] = write_base(tmp_path / "half", pieces)
    source = read_source(recipe, Checkpoint(parts=parts))
    assert source.dtype == "float16"
    key = "layers.1.mlp.down_proj.weight"
    state = {name: tensor.float() for name, tensor in pieces.language.items()}
    wanted = merged(state, make_adapters(pieces, rank=4), 2.0)[f"model.{key}"]
    seen = source.weights[f"decoder.{key}"].load()
    assert seen.dtype == torch.float16 and (seen - wanted.half()).abs().max() < 2e-3
    # What has no adapter is not copied.
    assert isinstance(source.weights["decoder.norm.weight"], TensorRef)


def test_trained_tensors_replace_those_of_the_base(tmp_path, recipe, parts, pieces, theirs):
    """With rows for new tokens, and with a tower that was trained as well."""
    whole = dict(pieces.language)
    trained = {
        **pieces.projector,
        "model.embed_tokens.weight": whole["model.embed_tokens.weight"],
        "lm_head.weight": whole["lm_head.weight"],
        **under("model.vision_tower.vision_tower.vision_model.", pieces.tower),
    }
    torch.save(under("base_model.model.", trained), parts["main"] / "non_lora_trainables.bin")
    fewer = pieces.llm_config["vocab_size"] - 3
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        pieces.language[key] = torch.zeros(fewer, 32)
    pieces.llm_config["vocab_size"] = fewer
    parts["base"] = write_base(tmp_path / "fewer", pieces)
    # Sizes alone are read there.
    pieces.tower = {key: torch.zeros_like(tensor) for key, tensor in pieces.tower.items()}
    parts["tower"] = write_clip(tmp_path / "zeros", pieces)
    pieces.language = whole
    adapters = make_adapters(pieces, rank=4)
    assert_all_logits_equal(build(recipe, parts), merged_model(theirs, pieces, adapters, 2.0))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "LORA"),
        ({"r": 0}, "whole number"),
        ({"r": 4.0}, "whole number"),
        ({"r": ...}, "whole number"),
        ({"lora_alpha": 0}, "number above 0"),
        ({"lora_alpha": float("nan")}, "number above 0"),
        ({"lora_alpha": "8"}, "number above 0"),
        ({"lora_alpha": 10**400}, "number above 0"),
        ({"use_rslora": "yes"}, "true or false"),
        ({"target_modules": []}, "a list of names"),
        ({"target_modules": None}, "a list of names"),
        ({"fan_in_fan_out": True}, "off"),
        ({"bias": "lora_only"}, "off"),
        ({"use_dora": True}, "off"),
        ({"layers_to_transform": 0}, "off"),
        ({"some_new_switch": 1}, "off"),
        ({"init_lora_weights": "pissa_niter_4"}, "leaves the base model's weights"),
    ],
)
def test_adapter_that_is_not_implemented_is_refused(recipe, parts, changes, said):
    edit_json(parts["main"] / "adapter_config.json", **changes)
    text = refusal(recipe, parts)
    assert f"{next(iter(changes))} cannot be used" in text and said in text
    assert "merge_and_unload" in text


A = "model.layers.0.self_attn.q_proj.A"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({A: None}, "without its other half decoder.layers.0.self_attn.q_proj"),
        (
            {A: None, A[:-1] + "B": None},
            "missing adapters for decoder.layers.0.self_attn.q_proj.weight",
        ),
        ({A: torch.ones(3, 32)}, "F32 [3, 32] instead of [4, 32]"),
        ({A: torch.ones(4, 31)}, "[4, 31] instead of [4, 32]"),
        ({A: torch.ones(4)}, "[4] instead of [4, 32]"),
        ({A: torch.ones(4, 32, dtype=torch.int32)}, "I32"),
        ({"model.layers.7.self_attn.q_proj.A": torch.ones(4, 32)}, "unexpected decoder.layers.7."),
        ({"model.mm_projector.0.A": torch.ones(4, 32)}, "unexpected projector.linear_1.weight"),
        ({"model.embed_tokens.A": torch.ones(4, 32)}, "unexpected decoder.embed_tokens.weight"),
    ],
)
def test_adapters_must_match_exactly(tmp_path, recipe, parts, pieces, changes, said):
    adapters = make_adapters(pieces, rank=4) | changes
    kept = {key: tensor for key, tensor in adapters.items() if tensor is not None}
    parts["main"] = write_lora(tmp_path / "changed", pieces, kept)
    text = refusal(recipe, parts)
    assert said in text and "adapter_config.json" in text


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
    ],
)
def test_strange_name_of_an_adapter_is_refused(recipe, parts, key):
    file = parts["main"] / "adapter_model.bin"
    torch.save({**torch.load(file), key: torch.ones(4, 32)}, file)
    assert f"unexpected {key}" in refusal(recipe, parts)


def test_adapter_of_fewer_targets_than_the_config_names_is_refused(tmp_path, recipe, parts, pieces):
    adapters = make_adapters(pieces, rank=4, targets=("q_proj", "v_proj"))
    parts["main"] = write_lora(tmp_path / "fewer", pieces, adapters)
    text = refusal(recipe, parts)
    assert "missing adapters for decoder.layers.0.mlp.down_proj.weight" in text and "more" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 64, "intermediate_size": 96}, ["hidden_size 64", "hidden_size 32"]),
        ({"num_hidden_layers": 3}, ["num_layers 3", "num_layers 2"]),
        ({"rope_theta": 5e5}, ["rope_theta 500000", "rope_theta 10000"]),
    ],
)
def test_base_of_other_sizes_is_refused(tmp_path, recipe, parts, changes, said):
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.conftest import VOCABULARY

    sizes = {
        "vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "head_dim": 8,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).save_pretrained(tmp_path / "other")
    parts["base"] = tmp_path / "other"
    text = refusal(recipe, parts)
    assert "is not the base model" in text and "the tiny Llama it was trained on" in text
    assert all(word in text for word in said), text


def test_vocabulary_of_the_base_must_fit_where_it_is_not_replaced(tmp_path, recipe, parts, pieces):
    pieces.llm_config["vocab_size"] -= 1
    for key in ("model.embed_tokens.weight", "lm_head.weight"):
        pieces.language[key] = pieces.language[key][:-1]
    parts["base"] = write_base(tmp_path / "fewer", pieces)
    assert "decoder.embed_tokens.weight" in refusal(recipe, parts)


@pytest.mark.parametrize("role", ["base", "tower"])
def test_missing_part_says_how_to_pass_it(recipe, parts, role):
    del parts[role]
    assert f"--checkpoint {role}=" in refusal(recipe, parts)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("non_lora_trainables.bin", "without the model it belongs to"),
        ("adapter_model.bin", "no adapter weights"),
    ],
)
def test_missing_file_is_named(recipe, parts, name, said):
    (parts["main"] / name).unlink()
    text = refusal(recipe, parts)
    assert said in text and name in text


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        ({}, "holds no projector"),
        ({"base_model.model.model.odd": torch.ones(1)}, "unexpected decoder.odd"),
        ({"model.mm_projector.0.bias": torch.ones(32)}, "two names for one tensor"),
    ],
)
def test_trained_tensors_must_match_exactly(recipe, parts, pieces, trained, said):
    whole = under("base_model.model.", pieces.projector) if trained else {}
    torch.save({**whole, **trained}, parts["main"] / "non_lora_trainables.bin")
    assert said in refusal(recipe, parts)
