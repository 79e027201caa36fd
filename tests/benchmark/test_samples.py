"""Statistics of samples that are made up: no clock runs here."""

from __future__ import annotations

import math

import pytest

from gap_export.benchmark.samples import (
    counting,
    fastest,
    quiet,
    speedups,
    spread_of,
    stage_spreads,
)
from tests.benchmark.made_up import sample


def test_spread_is_median_and_quartiles():
    found = spread_of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (found.median, found.low, found.high, found.n) == (3.0, 2.0, 4.0, 5)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_there_is_no_median_of_nothing_nor_of_what_is_not_finite(values):
    with pytest.raises(ValueError, match="no median"):
        spread_of(values)


def test_busy_samples_are_set_aside_where_enough_are_quiet():
    samples = [sample(n, 10.0) for n in range(4)] + [sample(4, 90.0, others=0.5)]
    assert [one.number for one in counting(samples)] == [0, 1, 2, 3]
    assert stage_spreads(samples)["total"].high == 10.0


def test_all_count_where_too_few_are_quiet():
    samples = [sample(n, 10.0 + n, others=0.5 if n < 3 else 0.0) for n in range(5)]
    assert quiet(samples) == []
    assert counting(samples) == samples


def test_one_quiet_sample_of_one_is_enough():
    samples = [sample(0, 10.0)]
    assert quiet(samples) == samples


def test_speedup_is_of_each_round_by_itself():
    # The machine is twice as slow in every other round, for both.
    slow = [sample(n, 100.0 * (1 + n % 2)) for n in range(6)]
    fast = [sample(n, 50.0 * (1 + n % 2)) for n in range(6)]
    found = speedups(slow, fast)["total"]
    assert (found.median, found.low, found.high, found.n) == (2.0, 2.0, 2.0, 6)


def test_speedup_compares_no_round_that_was_busy_on_one_side():
    slow = [sample(n, 100.0) for n in range(5)]
    fast = [sample(n, 50.0) for n in range(4)] + [sample(4, 500.0, others=0.9)]
    assert speedups(slow, fast)["total"].n == 4


def test_speedup_knows_only_stages_of_both():
    found = speedups([sample(0, 100.0, text_encoder=3.0)], [sample(0, 50.0, prefix=3.0)])
    assert set(found) == {"total", "prefill"}


def test_the_fastest_has_the_smallest_median():
    clear = {"a": [sample(n, 20.0) for n in range(4)], "b": [sample(n, 10.0) for n in range(4)]}
    assert fastest(clear) == ("b", [])


def test_what_is_faster_in_a_quarter_of_the_rounds_cannot_be_told_from_the_fastest():
    first = [sample(n, 10.0) for n in range(4)]
    second = [sample(n, 9.0 if n < 2 else 12.0) for n in range(4)]
    best, unclear = fastest({"a": first, "b": second})
    assert (best, unclear) == ("a", ["b"])
