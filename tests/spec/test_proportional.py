"""What kept tokens count as adds up to what there was."""

from __future__ import annotations

from fractions import Fraction

import pytest

from gap_export.spec.proportional import spread_counts


@pytest.mark.parametrize("num_visual", [1, 2, 7, 108, 576])
def test_counts_are_as_equal_as_whole_numbers_can_be_and_add_up(num_visual):
    for num_kept in range(1, num_visual + 1):
        counts = spread_counts(num_visual, num_kept).tolist()
        assert sum(counts) == num_visual and len(counts) == num_kept
        assert min(counts) >= 1 and max(counts) - min(counts) <= 1
        # Wherever one stops, no more than one token has been counted too early or too late.
        for place in range(num_kept):
            share = Fraction((place + 1) * num_visual, num_kept)
            assert 0 <= share - sum(counts[: place + 1]) < 1


def test_nothing_counts_more_where_nothing_is_dropped():
    assert spread_counts(5, 5).tolist() == [1] * 5
    assert spread_counts(7, 3).tolist() == [2, 2, 3]
