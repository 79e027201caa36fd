"""How many tokens stand out, against Tukey's rule written out slowly."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.runtime.budget import count_outliers, settle_numbers
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


@settings(max_examples=200, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([144, 256, 576]))
def test_outliers_are_those_of_prumerge_and_trim(seed, size):
    """What both papers' code does to the float32 scores of one image."""
    logits = np.random.default_rng(seed).normal(scale=2, size=size).astype(np.float32)
    scores = np.exp(logits) / np.exp(logits).sum()
    first, third = np.percentile(scores, 25), np.percentile(scores, 75)
    theirs = len(np.where(scores > third + 1.5 * (third - first))[0])
    assert count_outliers(scores[None]).tolist() == [theirs]


@pytest.mark.parametrize(
    ("standing_out", "most", "buckets", "kept"),
    [
        # Exactly as many, at least one, K at most.
        (0, 576, (), 1), (1, 576, (), 1), (122, 576, (), 122), (119, 576, (), 119),
        (90, 576, (), 90), (576, 576, (), 576), (50, 43, (), 43), (7, 1, (), 1),
        # Bundles that name buckets round up to one of them, as they did when they were made.
        (0, 13, (4, 8, 13), 4), (4, 13, (4, 8, 13), 4), (5, 13, (4, 8, 13), 8),
        (9, 13, (4, 8, 13), 13), (99, 13, (4, 8, 13), 13),
    ],
)  # fmt: skip
def test_as_many_are_kept_as_stand_out(sample_manifest, standing_out, most, buckets, kept):
    pruning = dataclasses.replace(
        sample_manifest.pruning, budget="adaptive", num_kept_tokens=most, kept_buckets=buckets
    )
    assert settle_numbers(np.array([standing_out]), pruning).tolist() == [kept]
