"""How many tokens stand out, against Tukey's rule written out slowly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.runtime.budget import count_outliers, snap_to_buckets
from tests.pruning import slow


@settings(max_examples=300, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 60), coarse=st.booleans())
def test_outliers_equal_the_slow_ones(seed, size, coarse):
    scores = np.random.default_rng(seed).exponential(size=(3, size)).astype(np.float32)
    scores = np.round(scores) if coarse else scores
    wanted = [slow.outliers(row) for row in scores]
    assert count_outliers(scores).tolist() == wanted


@pytest.mark.parametrize("size", [144, 576, 2880])
def test_outliers_of_real_sizes_are_a_count_not_a_rounded_share(size):
    for wanted in (0, 1, 7, size // 5):
        scores = np.zeros((1, size))
        scores[0, :wanted] = 1.0
        assert count_outliers(scores).tolist() == [wanted]


def test_each_row_has_quartiles_of_its_own():
    row = np.array([0.0] * 20 + [5.0] * 3)
    alone = count_outliers(row[None])
    assert count_outliers(np.stack([row, 1000 + row])).tolist() == [3, 3]
    assert alone.tolist() == [3]


@pytest.mark.parametrize(
    ("wanted", "snapped"), [(0, 4), (1, 4), (4, 4), (5, 8), (8, 8), (9, 13), (99, 13)]
)
def test_numbers_are_snapped_up_to_what_there_is(wanted, snapped):
    assert snap_to_buckets(np.array([wanted]), (4, 8, 13)).tolist() == [snapped]
