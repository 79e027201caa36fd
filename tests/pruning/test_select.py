from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.pruning.select import gather_tokens, select_tokens


def slow_selection(scores: list[float], num_kept: int, order: str) -> list[int]:
    """Pick the best remaining token again and again; the first of equals is the best."""
    left = list(range(len(scores)))
    chosen = []
    for _ in range(num_kept):
        best = left[0]
        for index in left:
            if scores[index] > scores[best]:
                best = index
        chosen.append(best)
        left.remove(best)
    return sorted(chosen) if order == "raster" else chosen


# Few distinct values, so that most rows hold ties.
rows = st.lists(st.sampled_from([-1.0, -0.0, 0.0, 0.5, 0.5000001, 3.0]), min_size=1, max_size=20)


@settings(max_examples=150, deadline=None)
@given(row=rows, share=st.floats(0, 1), order=st.sampled_from(["raster", "score"]))
def test_selection_equals_the_slow_one(row, share, order):
    num_kept = max(1, round(share * len(row)))
    scores = torch.tensor([row, row[::-1]])
    found = select_tokens(scores, num_kept_tokens=num_kept, order=order)
    as_float32 = scores.tolist()
    assert found.tolist() == [slow_selection(r, num_kept, order) for r in as_float32]


@pytest.mark.parametrize("order", ["raster", "score"])
@pytest.mark.parametrize("num_tokens", [144, 576])
@pytest.mark.parametrize("share", ["one", "some", "all"])
def test_selection_on_real_sizes_with_ties(num_tokens, share, order):
    num_kept = {"one": 1, "some": round(0.3 * num_tokens), "all": num_tokens}[share]
    coarse = np.random.default_rng(0).integers(0, 12, size=(2, num_tokens)).astype(np.float32)
    found = select_tokens(torch.from_numpy(coarse), num_kept_tokens=num_kept, order=order)
    assert found.dtype == torch.int64
    assert found.tolist() == [slow_selection(r, num_kept, order) for r in coarse.tolist()]


def test_all_equal_keeps_the_first():
    for order in ("raster", "score"):
        found = select_tokens(torch.zeros(1, 9), num_kept_tokens=4, order=order)
        assert found.tolist() == [[0, 1, 2, 3]]


def test_gather_takes_each_rows_own_tokens():
    features = torch.arange(2 * 5 * 3, dtype=torch.float32).reshape(2, 5, 3)
    keep = torch.tensor([[4, 0], [1, 1]])
    gathered = gather_tokens(features, keep)
    assert gathered.tolist() == [
        [features[0, 4].tolist(), features[0, 0].tolist()],
        [features[1, 1].tolist(), features[1, 1].tolist()],
    ]
