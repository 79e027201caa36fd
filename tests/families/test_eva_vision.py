"""EVA's tower against a plain forward written from the definitions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gap_export.checkpoint.weights import index_pickle, reshaped
from gap_export.errors import CheckpointError
from gap_export.families.minigpt_v2.eva_checkpoint import interpolated_positions, read_eva_tower
from gap_export.families.minigpt_v2.eva_vision import EvaVisionTower
from tests.families.llava_layouts import State
from tests.families.tiny_minigpt_v2 import (
    HEADS,
    JOIN,
    LAYERS,
    SIDE,
    WIDTH,
    attention_by_hand,
    block_of,
    hidden_by_hand,
    make_minigpt,
    norm_by_hand,
    positions_by_hand,
    tokens_by_hand,
    vision_shape,
)

ATOL = 1e-5
TOKENS = SIDE * SIDE // JOIN


@pytest.fixture
def eva() -> State:
    return dict(make_minigpt().eva)


@pytest.fixture
def ln_vision() -> State:
    generator = torch.Generator().manual_seed(7)
    return {
        "ln_vision.weight": 1 + torch.randn(WIDTH, generator=generator) * 0.3,
        "ln_vision.bias": torch.randn(WIDTH, generator=generator),
    }


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 4 * SIDE, 4 * SIDE, generator=torch.Generator().manual_seed(3))


def load_tower(folder: Path, eva: State, ln_vision: State) -> EvaVisionTower:
    torch.save(eva, folder / "eva_vit_g.pth")
    found = read_eva_tower(folder / "eva_vit_g.pth", vision_shape())
    state = {key.removeprefix("tower."): weight.load() for key, weight in found.items()}
    state |= {k.replace("ln_vision", "post_layernorm"): t for k, t in ln_vision.items()}
    tower = EvaVisionTower(vision_shape(), num_layers=LAYERS, join=JOIN).eval()
    tower.load_state_dict(state, strict=True)
    return tower


def refusal(folder: Path, eva: State) -> str:
    torch.save(eva, folder / "eva_vit_g.pth")
    with pytest.raises(CheckpointError) as caught:
        read_eva_tower(folder / "eva_vit_g.pth", vision_shape())
    return str(caught.value)


def test_tokens_are_four_neighbours_of_the_plain_forward(eva, ln_vision, tmp_path):
    with torch.inference_mode():
        ours = load_tower(tmp_path, eva, ln_vision)(images())
        wanted = tokens_by_hand(eva, images(), ln_vision)
    assert ours.patches.shape == (2, TOKENS, JOIN * WIDTH)
    assert wanted.abs().max() > 0.5
    assert (ours.patches - wanted).abs().max() < ATOL


def test_a_token_is_wide_and_not_high(eva, ln_vision, tmp_path):
    """Without layers a token sees its own pixels alone: 4 pixels high, 16 wide."""
    tower = load_tower(tmp_path, eva, ln_vision)
    for layer in tower.encoder.layers:
        for linear in (layer.self_attn.out_proj, layer.mlp.fc2):
            torch.nn.init.zeros_(linear.weight)
    changed = images(1)
    # Row 3 and columns 4 to 7 of the patches.
    changed[:, :, 12:16, 16:32] += 1.0
    with torch.inference_mode():
        moved = (tower(changed).patches - tower(images(1)).patches).abs().amax(dim=2)[0]
    assert torch.nonzero(moved > 1e-4).flatten().tolist() == [3 * (SIDE // JOIN) + 1]


def test_cls_is_repeated_and_its_attention_averaged(eva, ln_vision, tmp_path):
    tower = load_tower(tmp_path, eva, ln_vision)
    with torch.inference_mode():
        ours = tower(images())
        before = hidden_by_hand(eva, images(), num_blocks=1)
        block = block_of(eva, 1)
        norm1 = block["norm1.weight"], block["norm1.bias"]
        normed = torch.nn.functional.layer_norm(before, (WIDTH,), *norm1, eps=1e-6)
        weights, _ = attention_by_hand(block, normed)
        cls = norm_by_hand(hidden_by_hand(eva, images(), num_blocks=2), ln_vision)[:, 0]
    assert weights.shape[1] == HEADS
    wanted = weights[:, :, 0, 1:].mean(dim=1).reshape(2, TOKENS, JOIN).mean(dim=2)
    assert (ours.cls_attention - wanted).abs().max() < ATOL
    received = weights.mean(dim=(1, 2))[:, 1:].reshape(2, TOKENS, JOIN).mean(dim=2)
    assert (ours.received_attention() - received).abs().max() < ATOL
    assert (ours.cls.reshape(2, JOIN, WIDTH) - cls[:, None]).abs().max() < ATOL
    assert ours.cls_attention.sum(dim=1).max() < 1.0 / JOIN


def test_positions_are_interpolated_but_for_that_of_cls(eva, tmp_path):
    torch.save(eva, tmp_path / "eva.pth")
    table = index_pickle(tmp_path / "eva.pth")["pos_embed"]
    flat = reshaped(table, table.shape[1:])
    ours = interpolated_positions(flat, SIDE).load()
    assert torch.equal(ours[0], eva["pos_embed"][0, 0])
    assert (ours - positions_by_hand(eva["pos_embed"])[0]).abs().max() < 1e-6
    # Of a table of the right size not a byte is touched.
    assert interpolated_positions(flat, SIDE // 2) is flat


def test_half_precision_positions_stay_half_precision(eva, tmp_path):
    halves = {key: tensor.half() for key, tensor in eva.items()}
    torch.save(halves, tmp_path / "eva.pth")
    key = "tower.embeddings.position_embedding.weight"
    ours = read_eva_tower(tmp_path / "eva.pth", vision_shape())[key]
    wanted = positions_by_hand(halves["pos_embed"].float())[0].half()
    assert ours.dtype == "F16" and torch.equal(ours.load(), wanted)


def test_fused_projections_are_split_and_keys_get_a_bias_of_zero(eva, tmp_path):
    torch.save(eva, tmp_path / "eva.pth")
    found = read_eva_tower(tmp_path / "eva.pth", vision_shape())
    prefix = "tower.encoder.layers.1.self_attn."
    parts = [found[f"{prefix}{name}_proj.weight"].load() for name in "qkv"]
    assert torch.equal(torch.cat(parts), eva["blocks.1.attn.qkv.weight"])
    assert not found[f"{prefix}k_proj.bias"].load().any()
    assert torch.equal(found[f"{prefix}v_proj.bias"].load(), eva["blocks.1.attn.v_bias"])


def test_known_leftovers_are_passed_over(eva, tmp_path):
    """The block behind the tower, the classifier and its norms, there or not."""
    bare = {k: t for k, t in eva.items() if not k.startswith((f"blocks.{LAYERS}.", "norm", "head"))}
    more = {**eva, "fc_norm.weight": torch.ones(WIDTH)}
    for state in (bare, more, {"model": eva}):
        torch.save(state, tmp_path / "eva.pth")
        found = read_eva_tower(tmp_path / "eva.pth", vision_shape())
        assert not any(f"layers.{LAYERS}." in key for key in found)


@pytest.mark.parametrize("key", ["blocks.0.attn.k_bias", "blocks.3.norm1.bias", "mask_token"])
def test_anything_else_left_over_is_refused(eva, tmp_path, key):
    message = refusal(tmp_path, {**eva, key: torch.ones(WIDTH)})
    assert f"unexpected {key}" in message and "the recipe" in message


def test_missing_and_misshaped_tensors_are_refused(eva, tmp_path):
    fewer = {k: t for k, t in eva.items() if k != "blocks.1.attn.q_bias"}
    assert "missing blocks.1.attn.q_bias" in refusal(tmp_path, fewer)
    no_positions = {k: t for k, t in eva.items() if k != "pos_embed"}
    assert "missing pos_embed" in refusal(tmp_path, no_positions)
    wrong = {**eva, "blocks.0.mlp.fc1.weight": torch.ones(WIDTH, WIDTH)}
    assert "blocks.0.mlp.fc1.weight [16, 16] instead of [24, 16]" in refusal(tmp_path, wrong)


@pytest.mark.parametrize("shape", [(1, 1, WIDTH), (1, 16, WIDTH), (17, WIDTH), (1, 17, 8)])
def test_table_that_is_no_square_of_patches_is_refused(eva, tmp_path, shape):
    message = refusal(tmp_path, {**eva, "pos_embed": torch.ones(shape)})
    assert "pos_embed" in message and str(list(shape)) in message
