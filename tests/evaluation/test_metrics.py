"""IoU, accuracy and its interval."""

from __future__ import annotations

import pytest

from gap_export.evaluation.metrics import (
    accuracy_at,
    intersection_over_union,
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
