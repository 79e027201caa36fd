"""Towers on a declared canvas against transformers' own, which take any grid."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.vision_utils import get_vision_window_index

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.checkpoint.weights import filled
from gap_export.families import build_reference, resolve_pruning
from gap_export.families.qwen_vl.canvas_weights import interpolated_table
from gap_export.spec.recipe import Recipe
from gap_export.spec.requests import PruningRequest
from tests.families.qwen_vl.tiny import (
    CANVASES,
    HEADS,
    MERGE,
    PATCH,
    WIDTH,
    Tiny,
    plain_recipe,
    tower_outputs,
)

ATOL = 1e-5
HIDDEN = 64


def reference_of(tiny: Tiny, canvas: tuple[int, int], **request: Any) -> Any:
    recipe = Recipe.model_validate(plain_recipe(tiny.family, canvas))
    pruning = resolve_pruning(recipe, PruningRequest(**request))
    return build_reference(recipe, Checkpoint.of(tiny.folder), pruning, device="cpu")


def images(canvas: tuple[int, int], number: int = 2) -> torch.Tensor:
    return torch.randn(number, 3, *canvas, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES)
def test_merged_tokens_and_taps_equal_those_of_transformers(tiny, canvas):
    reference = reference_of(tiny, canvas, keep_ratio=1.0)
    pixels = images(canvas)
    main, taps = tower_outputs(tiny, pixels)
    assert len(taps) == (2 if tiny.family == "qwen3_vl" else 0)
    wanted = torch.cat([main, *taps], dim=2)
    with torch.inference_mode():
        features, keep = reference.vision_encoder(pixels)
    assert wanted.std() > 0.3
    assert keep.tolist() == [list(range(main.shape[1]))] * 2
    assert (features - wanted).abs().max() < ATOL


def test_dropped_tokens_are_dropped_from_every_tap(tiny):
    canvas = CANVASES["rows > cols"]
    reference = reference_of(tiny, canvas, pruner="divprune", keep_ratio=0.3)
    pixels = images(canvas)
    main, taps = tower_outputs(tiny, pixels)
    every = torch.cat([main, *taps], dim=2)
    with torch.inference_mode():
        features, keep = reference.vision_encoder(pixels)
    wanted = torch.stack([one[index] for one, index in zip(every, keep, strict=True)])
    assert keep.shape == (2, 6) and (features - wanted).abs().max() < ATOL


def test_a_pruner_reads_tokens_without_their_taps(tiny):
    """The choice by projected tokens is the one of a tower that has no taps."""
    canvas = CANVASES["rows < cols"]
    encoder = reference_of(tiny, canvas, pruner="divprune", keep_ratio=0.4).vision_encoder
    pixels = images(canvas)
    with torch.inference_mode():
        state = encoder._state(pixels, (), encoder.projector)
    main, _ = tower_outputs(tiny, pixels)
    assert state.image_embeds.shape == main.shape
    assert (state.image_embeds - main).abs().max() < ATOL


def last_attention(tiny: Tiny, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights of transformers' last block [heads, P, P], and its keys before RoPE [P, heads, d]."""
    attention = tiny.model.model.visual.blocks[-1].attn
    seen: dict[str, torch.Tensor] = {}
    hooks = [
        attention.register_forward_pre_hook(
            lambda _, args, kwargs: seen.update(hidden=args[0] if args else kwargs["hidden_states"],
                                                place=kwargs["position_embeddings"]),
            with_kwargs=True,
        )
    ]  # fmt: skip
    tower_outputs(tiny, pixels)
    for hook in hooks:
        hook.remove()
    with torch.inference_mode():
        fused = attention.qkv(seen["hidden"]).reshape(-1, 3, HEADS, WIDTH // HEADS)
        query, key, _ = fused.unbind(1)
        cos, sin = (part.unsqueeze(1) for part in seen["place"])

        def turned(heads: torch.Tensor) -> torch.Tensor:
            first, second = heads.chunk(2, dim=-1)
            return heads * cos + torch.cat((-second, first), dim=-1) * sin

        scores = torch.einsum("qhd,khd->hqk", turned(query), turned(key))
        return (scores * (WIDTH // HEADS) ** -0.5).softmax(dim=-1), key


def raster_order(tiny: Tiny, canvas: tuple[int, int]) -> torch.Tensor:
    """Where transformers has each token, which it holds window by window in Qwen2.5-VL."""
    rows, cols = (side // PATCH for side in canvas)
    if tiny.family != "qwen2_5_vl":
        return torch.arange(rows * cols // MERGE**2)
    config = tiny.model.config.vision_config
    index, _ = get_vision_window_index(
        torch.tensor([[1, rows, cols]]), MERGE, config.window_size, PATCH
    )
    return torch.argsort(index)


@pytest.mark.parametrize("canvas", CANVASES.values(), ids=CANVASES)
def test_received_attention_and_keys_are_those_of_the_last_block(tiny, canvas):
    tower = reference_of(tiny, canvas, keep_ratio=1.0).vision_encoder.tower
    pixels = images(canvas, 1)
    with torch.inference_mode():
        features = tower(pixels)
    weights, keys = last_attention(tiny, pixels)
    # transformers holds the four patches of a token one after the other.
    received = weights.mean(dim=(0, 1)).reshape(-1, MERGE * MERGE).mean(dim=1)
    per_token = keys.mean(dim=1).reshape(len(received), -1)
    raster = raster_order(tiny, canvas)
    assert (features.received_attention[0] - received[raster]).abs().max() < ATOL
    assert received.std() > 0.001
    assert (features.keys[0] - per_token[raster]).abs().max() < ATOL


def test_a_tower_of_a_folder_is_made_for_any_canvas(tiny):
    for canvas in [(PATCH * MERGE, PATCH * MERGE), (8, 64), (40, 40)]:
        pixels = images(canvas, 1)
        main, taps = tower_outputs(tiny, pixels)
        with torch.inference_mode():
            features, _ = reference_of(tiny, canvas, keep_ratio=1.0).vision_encoder(pixels)
        assert (features - torch.cat([main, *taps], dim=2)).abs().max() < ATOL


def test_a_table_of_the_canvas_is_taken_as_it_is():
    table = filled((16, 3), 1.0, "F32")
    assert interpolated_table(table, (4, 4)) is table
    assert interpolated_table(table, (1, 4)).load().shape == (4, 3)


def test_half_precision_is_near(tiny_of):
    tiny = tiny_of("qwen3_vl")
    canvas = CANVASES["rows < cols"]
    recipe = Recipe.model_validate(plain_recipe(tiny.family, canvas))
    pruning = resolve_pruning(recipe, PruningRequest(keep_ratio=1.0))
    half = build_reference(
        recipe, Checkpoint.of(tiny.folder), pruning, device="cpu", dtype="float16"
    )
    pixels = images(canvas)
    main, taps = tower_outputs(tiny, pixels)
    with torch.inference_mode():
        features, _ = half.vision_encoder(pixels)
    assert features.dtype == torch.float16
    assert (features.float() - torch.cat([main, *taps], dim=2)).abs().max() < 0.05


def test_taps_of_another_layer_are_other_features(tiny_of):
    tiny = tiny_of("qwen3_vl")
    canvas = CANVASES["rows < cols"]
    pixels = images(canvas)
    encoder = reference_of(tiny, canvas, keep_ratio=1.0).vision_encoder
    with torch.inference_mode():
        right, _ = encoder(pixels)
        encoder.tower.taps = (1, 2)
        wrong, _ = encoder(pixels)
    assert torch.equal(right[..., :HIDDEN], wrong[..., :HIDDEN])
    assert (right - wrong)[..., HIDDEN : 2 * HIDDEN].abs().max() > 0.1
