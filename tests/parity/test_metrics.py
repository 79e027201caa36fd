"""IoU, accuracy and its interval."""

from __future__ import annotations

import pytest

from gap_export.parity.metrics import (
    accuracy_at,
    intersection_over_union,
    paired_difference_interval,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0.0),
        ((0, 0, 4, 4), (1, 1, 3, 3), 0.25),
        ((0, 0, 0, 4), (0, 0, 4, 4), 0.0),
        ((3, 3, 1, 1), (0, 0, 4, 4), 0.0),
    ],
)
def test_iou_of_known_boxes_in_both_directions(first, second, expected):
    assert intersection_over_union(first, second) == pytest.approx(expected)
    assert intersection_over_union(second, first) == pytest.approx(expected)


def test_accuracy_needs_more_than_the_threshold():
    assert accuracy_at([0.5, 0.51, 0.0, 1.0]) == 0.5


def test_accuracy_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no samples"):
        accuracy_at([])


def test_wilson_interval_matches_published_values():
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29
    for hits, total, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(hits, total) == pytest.approx((low, high), abs=6e-5)


@pytest.mark.parametrize(("hits", "total"), [(1, 0), (3, 2), (-1, 4)])
def test_wilson_interval_refuses_what_is_no_proportion(hits, total):
    with pytest.raises(ValueError, match="not a proportion"):
        wilson_interval(hits, total)


def test_paired_interval_matches_published_values():
    # As Newcombe 1998 (paired data) has them for method 10
    for counts, low, high in [
        ((36, 12, 2, 0), 0.0569, 0.3404),
        ((18, 12, 2, 18), 0.0562, 0.3290),
        ((53, 0, 0, 1), -0.0729, 0.0729),
    ]:
        assert paired_difference_interval(*counts) == pytest.approx((low, high), abs=6e-5)


def test_paired_interval_turns_with_its_sides():
    low, high = paired_difference_interval(30, 9, 2, 9)
    assert paired_difference_interval(30, 2, 9, 9) == pytest.approx((-high, -low))


@pytest.mark.parametrize("total", [1, 500])
def test_paired_interval_of_two_that_agree_holds_zero(total):
    for counts in ((total, 0, 0, 0), (0, 0, 0, total)):
        low, high = paired_difference_interval(*counts)
        assert -1 <= low < 0 < high <= 1


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (1, -1, 0, 2)])
def test_paired_interval_refuses_what_are_no_counts(counts):
    with pytest.raises(ValueError, match="no counts"):
        paired_difference_interval(*counts)
