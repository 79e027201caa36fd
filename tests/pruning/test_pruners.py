"""Each pruner against a definition written out slowly in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.errors import UsageError
from gap_export.pruning import PRESETS, FixedPruner, VisionState, find_pruner
from gap_export.spec.manifest import GridSpec
from gap_export.spec.positions import num_kept_tokens
from tests.pruning import slow

SIZES = [(144, 12, 12), (576, 24, 24)]


def state(num_tokens: int, *, sign: int = 1) -> VisionState:
    """Random parts, with every fourth token a copy of the one before it (ties)."""
    rng = np.random.default_rng(num_tokens)
    patches = rng.normal(size=(2, num_tokens, 6)).astype(np.float32)
    embeds = rng.normal(size=(2, num_tokens, 5)).astype(np.float32)
    attention = rng.random(size=(2, num_tokens)).astype(np.float32)
    for part in (patches, embeds, attention):
        part[:, 3::4] = part[:, 2::4]
    tensors = {
        "patch_features": patches,
        "patch_embeds": embeds,
        "cls_attention": attention,
        "cls_features": rng.normal(size=(2, 6)).astype(np.float32),
        "text_embeds": rng.normal(size=(2, 5)).astype(np.float32),
    }
    return VisionState(
        **{k: torch.from_numpy(v) for k, v in tensors.items()}, text_similarity_sign=sign
    )


@pytest.mark.parametrize("num_tokens", [144, 576])
@pytest.mark.parametrize("sign", [1, -1])
def test_scores_equal_the_slow_definition(num_tokens, sign):
    seen = state(num_tokens, sign=sign)
    for row in range(2):
        parts = {k: v[row].numpy() for k, v in vars(seen).items() if isinstance(v, torch.Tensor)}
        wanted = {
            "cls": slow.cls_scores(parts["cls_features"], parts["patch_features"]),
            "text": slow.text_scores(parts["text_embeds"], parts["patch_embeds"], sign),
            "fastervlm": parts["cls_attention"],
        }
        for name, definition in wanted.items():
            scores = find_pruner(name).scores(seen).numpy()
            assert scores.shape == (2, num_tokens)
            assert np.abs(scores[row] - definition).max() < 1e-5, name
            assert np.array_equal(scores[:, 2::4], scores[:, 3::4]), f"{name} breaks ties"


def test_text_scores_are_not_normalized():
    seen = state(144)
    longer = VisionState(
        patch_features=seen.patch_features,
        patch_embeds=seen.patch_embeds * 4,
        text_embeds=seen.text_embeds,
    )
    text = find_pruner("text")
    # A power of two, so that the two sides are equal to the last bit.
    assert torch.equal(text.scores(longer), 4 * text.scores(seen))


def test_cls_score_of_a_zero_patch_is_zero():
    seen = VisionState(patch_features=torch.zeros(1, 2, 3), cls_features=torch.ones(1, 3))
    assert find_pruner("cls").scores(seen).tolist() == [[0.0, 0.0]]


def slow_spatial(grid: GridSpec, count: int) -> list[int]:
    wanted = int(math.sqrt(count * grid.rows / grid.cols) + 0.5)
    num_rows = max(1, min(wanted, grid.rows, count))
    while num_rows * grid.cols < count:
        num_rows += 1
    places = []
    for u in range(num_rows):
        in_row = math.floor((u + 1) * count / num_rows) - math.floor(u * count / num_rows)
        row = math.floor((u + 0.5) * grid.rows / num_rows)
        columns = [math.floor((v + 0.5) * grid.cols / in_row) for v in range(in_row)]
        places += [row * grid.cols + column for column in columns]
    return places


@settings(max_examples=300, deadline=None)
@given(rows=st.integers(1, 40), cols=st.integers(1, 40), share=st.floats(0.001, 1))
def test_spatial_keeps_exactly_k_different_places_on_any_grid(rows, cols, share):
    grid = GridSpec(rows=rows, cols=cols)
    count = num_kept_tokens(share, grid.num_visual_tokens)
    places = find_pruner("spatial").places(grid, num_kept_tokens=count, seed=None).tolist()
    assert len(places) == len(set(places)) == count
    assert places == sorted(places)
    assert places[0] >= 0 and places[-1] < grid.num_visual_tokens


@pytest.mark.parametrize(("num_tokens", "rows", "cols"), SIZES)
def test_spatial_equals_the_slow_definition_for_every_k(num_tokens, rows, cols):
    grid = GridSpec(rows=rows, cols=cols)
    for count in range(1, num_tokens + 1):
        places = find_pruner("spatial").places(grid, num_kept_tokens=count, seed=None)
        assert places.tolist() == slow_spatial(grid, count), count


def test_spatial_at_its_ends():
    grid = GridSpec(rows=12, cols=12)
    spatial = find_pruner("spatial")
    assert spatial.places(grid, num_kept_tokens=1, seed=None).tolist() == [78]
    assert spatial.places(grid, num_kept_tokens=144, seed=None).tolist() == list(range(144))
    # One of four, as evenly as can be: every second row, every second column.
    quarter = [r * 12 + c for r in range(1, 12, 2) for c in range(1, 12, 2)]
    assert spatial.places(grid, num_kept_tokens=36, seed=None).tolist() == quarter


@pytest.mark.parametrize(("num_tokens", "rows", "cols"), SIZES)
@pytest.mark.parametrize("seed", [0, 7, 2**40])
def test_random_takes_the_smallest_lots_in_the_order_drawn(num_tokens, rows, cols, seed):
    grid, random = GridSpec(rows=rows, cols=cols), find_pruner("random")
    generator = np.random.PCG64(seed)
    lots = sorted((int(generator.random_raw()), index) for index in range(num_tokens))
    for count in (1, num_tokens // 3, num_tokens):
        places = random.places(grid, num_kept_tokens=count, seed=seed)
        assert places.dtype == np.int64
        assert places.tolist() == [index for _, index in lots[:count]]


def test_random_draws_stay_what_they_were():
    places = find_pruner("random").places(GridSpec(rows=12, cols=12), num_kept_tokens=6, seed=0)
    assert places.tolist() == PINNED_DRAW
    other = find_pruner("random").places(GridSpec(rows=12, cols=12), num_kept_tokens=6, seed=1)
    assert other.tolist() != PINNED_DRAW


# Places of seed 0 on a 12x12 grid; a bundle's manifest names only the seed, so they may not change.
PINNED_DRAW = [11, 92, 113, 3, 20, 111]


def test_every_preset_says_what_it_is():
    for name, preset in PRESETS.items():
        pruner = preset.pruner
        assert preset.name == name
        assert pruner.summary
        assert preset.paper.startswith("arXiv") or name in {"extent", "extent-llm"}
        assert pruner.uses_seed == (name == "random")
        assert not (isinstance(pruner, FixedPruner) and pruner.reads)
        assert preset.order in pruner.orders and preset.extra_token in pruner.extra_tokens


def test_unknown_pruner_is_refused_with_near_names():
    with pytest.raises(UsageError, match=r"spacial.*allowed: cls, text.*did you mean spatial"):
        find_pruner("spacial")
