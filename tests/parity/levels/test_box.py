"""Boxes: equal, tied, or elsewhere."""

from __future__ import annotations

import pytest

from gap_export.errors import GapExportError
from gap_export.parity.levels.box import judge_boxes
from tests.parity.levels.pairs import BOX, EOS, answer, other, pair, same, tie

MOVED = (10.0, 10.0, 50.0, 49.0)


def test_equal_boxes_pass():
    found = judge_boxes([same(), same()])
    assert found.status == "passed" and found.rows == ()
    assert found.figures["mean_iou"] == found.figures["share_over_95"] == 1.0


def test_another_box_fails_with_both_and_their_overlap():
    found = judge_boxes([same(), pair(answer(), answer(box=MOVED))])
    assert found.status == "failed"
    (row,) = found.rows
    assert (row.reference, row.candidate) == (BOX, MOVED)
    assert row.iou == pytest.approx(39 / 40)
    assert found.figures["mean_iou"] == pytest.approx((1 + 39 / 40) / 2)
    # As near as 0.95 is counted, and still another box.
    assert found.figures["share_over_95"] == 1.0


def test_a_tie_explains_a_box():
    found = judge_boxes([same(), tie()])
    assert found.status == "passed"
    assert (found.figures["equal"], found.figures["ties"]) == (1, 1)
    assert found.figures["mean_iou"] == 0.5


def test_a_tie_with_the_same_box_counts_once():
    logits = [[1.0, 1.0, 0.0]]
    found = judge_boxes([pair(answer(), answer((1, EOS)), logits), other()])
    assert (found.figures["equal"], found.figures["ties"]) == (1, 0)
    assert found.status == "failed"


@pytest.mark.parametrize(("bar", "status"), [(0.5, "passed"), (0.51, "failed")])
def test_the_bar_is_a_share_of_the_questions(bar, status):
    assert judge_boxes([same(), other()], bar=bar).status == status


def test_no_box_on_both_sides_is_agreement_and_on_one_is_not():
    neither = pair(answer(box=None), answer(box=None))
    assert judge_boxes([neither]).status == "passed"
    assert judge_boxes([neither]).figures["mean_iou"] == 1.0
    for one in (pair(answer(box=None), answer()), pair(answer(), answer(box=None))):
        assert judge_boxes([one]).status == "failed"
        assert judge_boxes([one]).figures["mean_iou"] == 0.0


def test_no_answer_fails():
    found = judge_boxes([pair(answer(), GapExportError("out of order"))])
    assert found.status == "failed" and found.rows[0].candidate is None


def test_other_tokens_of_the_same_box_are_not_looked_at():
    assert judge_boxes([other(box=BOX)]).status == "passed"
