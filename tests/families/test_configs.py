"""Sizes read from configs as the models' repositories hold them: terse, and of old transformers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from transformers import LlavaConfig, LlavaNextConfig

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import CheckpointError
from gap_export.families import read_source
from gap_export.families.common.checkpoints.configs import (
    check_architecture,
    clip_vision_shape,
    decoder_shape,
)
from gap_export.spec.architecture import Architecture, DecoderShape, ProjectorShape, VisionShape
from gap_export.spec.manifest import GridSpec
from gap_export.spec.recipe import Recipe, find_recipe, load_recipe
from tests.families.tiny_llava_next import plain_recipe

FILE = Path("config.json")
VICUNA = {"model_type": "llama", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
VICUNA_13B = {
    **VICUNA,
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
MISTRAL = {
    "model_type": "mistral",
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
}
CLIP_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
SEVEN_B = DecoderShape(
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    vocab_size=32064,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    activation="silu",
)


def text_config(kind: Any, plain: dict[str, Any]) -> Any:
    text = {"vocab_size": 32064, "torch_dtype": "float16", **plain}
    plain = {"model_type": kind.model_type, "text_config": text, "vision_config": CLIP_336}
    return kind.from_dict(plain).text_config


@pytest.mark.parametrize("kind", [LlavaConfig, LlavaNextConfig])
def test_vicuna_7b(kind):
    assert decoder_shape(text_config(kind, VICUNA), FILE) == SEVEN_B


def test_vicuna_13b():
    shape = decoder_shape(text_config(LlavaConfig, VICUNA_13B), FILE)
    assert (shape.hidden_size, shape.num_layers, shape.head_dim) == (5120, 40, 128)
    assert (shape.num_key_value_heads, shape.rope_theta) == (40, 1e4)


def test_mistral_7b():
    shape = decoder_shape(text_config(LlavaNextConfig, MISTRAL), FILE)
    assert (shape.num_heads, shape.num_key_value_heads, shape.head_dim) == (32, 8, 128)
    assert (shape.rope_theta, shape.max_position_embeddings) == (1e6, 32768)
    assert not shape.attention_bias and not shape.mlp_bias


def test_clip_large_336():
    config = LlavaConfig.from_dict({"vision_config": CLIP_336, "text_config": VICUNA})
    assert clip_vision_shape(config.vision_config, FILE) == VisionShape(
        width=1024,
        intermediate_size=4096,
        num_layers=24,
        num_heads=16,
        layer_norm_eps=1e-5,
        activation="quick_gelu",
        image_size=336,
        patch_size=14,
    )


@pytest.mark.parametrize(
    ("name", "kind", "decoder"),
    [
        ("llava-1.5-7b", LlavaConfig, VICUNA),
        ("llava-1.5-13b", LlavaConfig, VICUNA_13B),
        ("llava-1.6-vicuna-7b", LlavaNextConfig, VICUNA),
        ("llava-1.6-mistral-7b", LlavaNextConfig, MISTRAL),
    ],
)
def test_shipped_recipe_fits_the_published_config(name, kind, decoder):
    plain = {"vision_config": CLIP_336, "text_config": {"vocab_size": 32064, **decoder}}
    config = kind.from_dict(plain)
    found = Architecture(
        vision=clip_vision_shape(config.vision_config, FILE),
        projector=ProjectorShape(
            width=1024, hidden_size=config.text_config.hidden_size, activation="gelu"
        ),
        decoder=decoder_shape(config.text_config, FILE),
    )
    recipe, _ = find_recipe(name)
    assert recipe.architecture is not None
    check_architecture(recipe, found, FILE)
    assert recipe.grid.num_visual_tokens == 576
    if recipe.image.tiles is not None:
        wanted = [list(size) for size in recipe.image.tiles.resolutions]
        assert kind().image_grid_pinpoints == wanted


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sliding_window": 4096}, r"sliding_window.*4096.*null"),
        ({"model_type": "gemma"}, r"decoder model_type.*gemma.*llama, mistral, qwen2"),
        ({"num_key_value_heads": 5}, r"num_key_value_heads.*5.*divisor of.*32"),
        ({"rope_theta": None}, r"rope_theta.*None; allowed: a number above 0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, r"rope_type.*yarn.*default"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_type.*linear.*default"),
    ],
)
def test_decoder_that_is_not_implemented_is_refused(change, says):
    config = text_config(LlavaNextConfig, MISTRAL | change)
    with pytest.raises(CheckpointError, match=says):
        decoder_shape(config, FILE)


def tiny_architecture(**decoder: Any) -> Architecture:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_heads": 4}
    return Architecture(
        vision=VisionShape(
            width=32,
            intermediate_size=64,
            num_layers=3,
            num_heads=4,
            layer_norm_eps=1e-5,
            activation="quick_gelu",
            image_size=32,
            patch_size=8,
        ),
        projector=ProjectorShape(width=32, hidden_size=32, activation="gelu"),
        decoder=DecoderShape(
            **(sizes | {"num_key_value_heads": 4, "head_dim": 8, "vocab_size": 130} | decoder),
            max_position_embeddings=256,
            rms_norm_eps=1e-6,
            rope_theta=1e4,
            activation="silu",
        ),
    )


def recipe_of(architecture: Architecture | None) -> Recipe:
    recipe = Recipe.model_validate(plain_recipe())
    return recipe.model_copy(update={"architecture": architecture})


def test_recipe_and_checkpoint_agree():
    check_architecture(recipe_of(tiny_architecture()), tiny_architecture(), FILE)
    # Conversions add tokens.
    check_architecture(recipe_of(tiny_architecture()), tiny_architecture(vocab_size=194), FILE)


def test_every_size_that_differs_from_the_recipe_is_named():
    other = tiny_architecture(num_layers=4, hidden_size=64)
    with pytest.raises(CheckpointError) as caught:
        check_architecture(recipe_of(tiny_architecture()), other, FILE)
    message = str(caught.value)
    for word in ("decoder hidden_size", "decoder num_layers", "64", "4", "tiny-next"):
        assert word in message


@pytest.mark.parametrize("grid", [{"rows": 1, "cols": 16}, {"rows": 2, "cols": 8}])
def test_a_grid_of_the_right_number_and_the_wrong_shape_is_refused(tiny_checkpoint, grid):
    recipe = load_recipe(tiny_checkpoint / "recipe.yaml")
    wrong = recipe.model_copy(update={"grid": GridSpec(**grid)})
    with pytest.raises(CheckpointError, match="visual token grid"):
        read_source(wrong, Checkpoint.of(tiny_checkpoint))


@pytest.mark.parametrize(
    ("patches", "joined_rows", "grid"),
    [
        (1, 1, (24, 24)),
        (4, 1, (24, 6)),  # MiniGPT-v2: four of a row
        (4, 2, (12, 12)),  # Qwen-VL, InternVL: two by two
        (5, 1, (0, 0)),
        (2, 4, (0, 0)),
    ],
)
def test_grid_of_tokens_follows_from_how_patches_are_joined(patches, joined_rows, grid):
    recipe, _ = find_recipe("llava-1.5-7b")
    sizes = recipe.architecture
    projector = dataclasses.replace(sizes.projector, width=1024 * patches, joined_rows=joined_rows)
    assert dataclasses.replace(sizes, projector=projector).token_grid == grid
