"""InternViT against transformers' own, on random weights."""

from __future__ import annotations

import pytest
import torch

from gap_export.errors import RecipeError, UnsupportedPrunerError
from gap_export.families import supported_pruners
from gap_export.families.internvl.builder import INTERNVL
from gap_export.spec.architecture import Architecture, DecoderShape, ProjectorShape, VisionShape
from tests.families.internvl.conftest import Model, random_pixels
from tests.families.tiny_internvl import GRID

SIDE = 2 * GRID


def pooled(per_patch: torch.Tensor) -> torch.Tensor:
    """[I, patches] to [I, tokens], by a loop over tokens."""
    grid = per_patch.reshape(-1, SIDE, SIDE)
    means = [
        grid[:, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2].mean(dim=(1, 2))
        for row in range(GRID)
        for col in range(GRID)
    ]
    return torch.stack(means, dim=1)


def test_features_equal_transformers(model: Model):
    pixels = random_pixels(3)
    with torch.inference_mode():
        ours, *_ = model.reference().vision_encoder(pixels)
        theirs = model.theirs.get_image_features(pixels).pooler_output
    assert theirs.std() > 0.5
    assert (ours - theirs.reshape(ours.shape)).abs().max() <= 1e-4


def test_what_pruners_read_equals_transformers_attention_pooled_over_blocks(model: Model):
    pixels, tower = random_pixels(3), model.theirs.model.vision_tower
    reference = model.reference("fastervlm", 0.3)
    with torch.inference_mode():
        seen = reference.vision_encoder.tower(pixels)
        theirs = tower(pixels, output_attentions=True)
        _, keep, scores = reference.vision_encoder(pixels)
    attention = theirs.attentions[-1]
    cls = pooled(attention[:, :, 0, 1:].mean(dim=1))
    assert (seen.cls_attention - cls).abs().max() <= 1e-7
    received = pooled(attention.mean(dim=(1, 2))[:, 1:])
    assert (seen.received_attention() - received).abs().max() <= 1e-7
    assert (seen.cls[:, :32] - theirs.last_hidden_state[:, 0]).abs().max() <= 1e-5
    assert torch.equal(seen.cls, seen.cls[:, :32].repeat(1, 4))
    # A kept token is one of those that CLS looks at most, in each tile by itself.
    assert torch.equal(keep, cls.topk(5).indices.sort().values)
    assert (scores - cls).abs().max() <= 1e-7
    assert seen.keys.shape == (3, GRID * GRID, 4 * 16)


def test_patches_of_a_token_are_a_block_row_by_row():
    """With a tower that gives the numbers of its patches."""
    tower = INTERNVL.tower(shapes(joined=2), 1)
    numbers = torch.arange(SIDE * SIDE, dtype=torch.float32)[None, :, None]
    tokens = tower._joined(numbers).flatten(2)[0]
    assert tokens.shape == (GRID * GRID, 4)
    # Row 0, column 1: patches of the first two rows, third and fourth column.
    assert tokens[1].tolist() == [2, 3, SIDE + 2, SIDE + 3]
    assert tokens[GRID].tolist() == [2 * SIDE, 2 * SIDE + 1, 3 * SIDE, 3 * SIDE + 1]


def test_layer_scale_is_not_left_out(model: Model):
    pixels, reference = random_pixels(1), model.reference()
    with torch.inference_mode():
        before, *_ = reference.vision_encoder(pixels)
        for layer in reference.vision_encoder.tower.encoder.layers:
            layer.layer_scale1.fill_(1.0)
            layer.layer_scale2.fill_(1.0)
        after, *_ = reference.vision_encoder(pixels)
    assert (before - after).abs().max() > 0.1


def test_pruners_that_read_what_the_tower_has_not_are_refused(model: Model):
    names = supported_pruners(model.recipe)
    lacking = {"prumerge", "text", "trim", "cdpruner"}
    assert {"cls", "fastervlm", "visionzip", "random", "spatial", "divprune", "dart"} <= set(names)
    assert not lacking & set(names)
    for name in sorted(lacking):
        with pytest.raises(UnsupportedPrunerError, match=r"it lacks: (text|next_layer)"):
            model.reference(name, 0.3)


def test_blocks_that_do_not_divide_the_grid_are_refused():
    with pytest.raises(RecipeError, match=r"whole blocks of patches: width 96, 3 rows"):
        INTERNVL.tower(shapes(joined=3, width=96), 1)


def shapes(*, joined: int, width: int = 128) -> Architecture:
    sizes = {"intermediate_size": 64, "num_layers": 1}
    return Architecture(
        vision=VisionShape(
            width=32, num_heads=4, layer_norm_eps=1e-6, activation="gelu", image_size=32,
            patch_size=4, **sizes,
        ),
        projector=ProjectorShape(
            width=width, hidden_size=32, activation="gelu", joined_rows=joined, norm="layer_norm"
        ),
        decoder=DecoderShape(
            hidden_size=32, num_heads=4, num_key_value_heads=2, head_dim=8, vocab_size=64,
            max_position_embeddings=64, rms_norm_eps=1e-6, rope_theta=1e6, **sizes,
        ),
    )  # fmt: skip
