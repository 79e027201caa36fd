"""Intervals, p-values and curves, against brute force and known values."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.evaluation import statistics
from gap_export.evaluation.statistics import bootstrap_interval, mcnemar


def test_bootstrap_is_close_to_all_resamples_there_are():
    """Three clusters of unequal size have 27 resamples of equal chance."""
    clusters = {"a": [1.0, 1.0, 0.0], "b": [0.0], "c": [1.0, 0.0]}
    means = [
        np.concatenate([clusters[name] for name in drawn]).mean()
        for drawn in product(clusters, repeat=3)
    ]
    names = [name for name, values in clusters.items() for _ in values]
    values = np.concatenate(list(clusters.values()))
    low, high = bootstrap_interval(values, names, seed=0, num_resamples=20_000)
    # 2.5 % is less than 1 / 27, the chance of the smallest and largest mean alone.
    assert (low, high) == (min(means), max(means)) == (0.0, 2 / 3)


def test_bootstrap_is_what_a_loop_over_the_same_draws_gives():
    rng = np.random.default_rng(5)
    clusters = [f"image {index}" for index in rng.integers(0, 12, 60)]
    values = rng.random(60)
    names = sorted(set(clusters))
    raw = np.random.PCG64(9).random_raw(300 * len(names)).reshape(300, len(names))
    means = []
    for row in raw:
        drawn = [names[int(number) % len(names)] for number in row]
        picked = [v for name in drawn for v, c in zip(values, clusters, strict=True) if c == name]
        means.append(math.fsum(picked) / len(picked))
    found = bootstrap_interval(values, clusters, seed=9, num_resamples=300)
    assert found == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1e-12)


def test_bootstrap_of_single_questions_is_close_to_the_normal_interval():
    values = np.array([1.0] * 300 + [0.0] * 100)
    low, high = bootstrap_interval(values, [str(n) for n in range(400)], seed=1)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert low == pytest.approx(0.75 - half, abs=0.006)
    assert high == pytest.approx(0.75 + half, abs=0.006)


def test_questions_of_one_image_that_agree_widen_the_interval():
    values = np.repeat([1.0] * 30 + [0.0] * 10, 10)
    alone = bootstrap_interval(values, [str(n) for n in range(400)], seed=1)
    together = bootstrap_interval(values, [str(n // 10) for n in range(400)], seed=1)
    # Ten equal answers are worth one: sqrt(10) times as wide.
    ratio = (together[1] - together[0]) / (alone[1] - alone[0])
    assert ratio == pytest.approx(math.sqrt(10), rel=0.1)


def test_bootstrap_depends_on_the_seed_alone_and_not_on_the_order_of_questions():
    rng = np.random.default_rng(3)
    values = rng.random(200)
    clusters = [str(n) for n in rng.integers(0, 40, 200)]
    order = rng.permutation(200)
    first = bootstrap_interval(values, clusters, seed=7)
    assert bootstrap_interval(values, clusters, seed=7) == first
    assert bootstrap_interval(values[order], [clusters[n] for n in order], seed=7) == first
    assert bootstrap_interval(values, clusters, seed=8) != first


def test_bootstrap_is_the_same_drawn_in_small_blocks(monkeypatch):
    values = np.random.default_rng(0).random(50)
    clusters = [str(n // 3) for n in range(50)]
    whole = bootstrap_interval(values, clusters, seed=0)
    monkeypatch.setattr(statistics, "_MAX_DRAWN", 100)
    assert bootstrap_interval(values, clusters, seed=0) == whole


def test_bootstrap_of_one_image_or_of_equal_answers_has_no_width():
    assert bootstrap_interval(np.array([1.0, 0.0]), ["a", "a"], seed=0) == (0.5, 0.5)
    assert bootstrap_interval(np.zeros(9), list("abcdefghi"), seed=0) == (0.0, 0.0)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 5)), min_size=1, max_size=30))
def test_bootstrap_is_ordered_and_within_the_values(pairs):
    values = np.array([value for value, _ in pairs])
    names = [str(cluster) for _, cluster in pairs]
    low, high = bootstrap_interval(values, names, seed=0, num_resamples=50)
    assert values.min() - 1e-12 <= low <= high <= values.max() + 1e-12


@pytest.mark.parametrize(
    ("values", "clusters", "num_resamples"),
    [
        ([], [], 10),
        ([1.0], ["a", "b"], 10),
        ([1.0, math.nan], ["a", "b"], 10),
        ([1.0, math.inf], ["a", "b"], 10),
        ([1.0], ["a"], 0),
    ],
)
def test_bootstrap_of_nothing_or_of_what_is_no_number_is_refused(values, clusters, num_resamples):
    with pytest.raises(ValueError, match="values"):
        bootstrap_interval(np.array(values), clusters, seed=0, num_resamples=num_resamples)


def test_mcnemar_is_the_sum_over_the_binomial():
    for first, second in product(range(13), repeat=2):
        total = first + second
        tail = sum(math.comb(total, n) for n in range(min(first, second) + 1))
        assert mcnemar(first, second) == pytest.approx(min(1.0, 2 * tail / 2**total), rel=1e-12)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (0, 0, 1.0),
        (7, 7, 1.0),
        (0, 1, 1.0),
        (0, 5, 2 / 2**5),
        (5, 0, 2 / 2**5),
        (1, 9, 22 / 2**10),
        (2, 8, 112 / 2**10),
    ],
)
def test_mcnemar_of_known_tables(first, second, expected):
    assert mcnemar(first, second) == pytest.approx(expected, rel=1e-13)


def test_mcnemar_of_many_questions_is_exact_too():
    tail = sum(math.comb(1000, n) for n in range(481))
    assert mcnemar(480, 520) == pytest.approx(2 * tail / 2**1000, rel=1e-9)
    assert mcnemar(0, 1000) == pytest.approx(2.0**-999, rel=1e-9)
    assert mcnemar(0, 100_000) == 0.0
    assert mcnemar(500_000, 500_000) == 1.0


def test_mcnemar_of_negative_counts_is_refused():
    with pytest.raises(ValueError, match="-1 and 3"):
        mcnemar(-1, 3)
