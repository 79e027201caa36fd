"""Tokens and boxes: equal, tied, or clearly another."""

from __future__ import annotations

import pytest

from gap_export.errors import GapExportError
from gap_export.parity.levels.agreement import MAX_ROWS, judge_boxes, judge_tokens
from tests.parity.levels.pairs import BOX, EOS, answer, other, pair, same, tie

MOVED = (10.0, 10.0, 50.0, 49.0)
JUDGES = [judge_tokens, judge_boxes]


@pytest.mark.parametrize("judge", JUDGES)
def test_a_tie_is_counted_apart_and_passes(judge):
    found = judge([same(), tie()])
    assert found.status == "passed" and not found.reason
    assert (found.figures["questions"], found.figures["equal"], found.figures["ties"]) == (2, 1, 1)


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize(("bar", "status"), [(0.5, "passed"), (0.51, "failed")])
def test_the_bar_is_a_fraction_of_the_questions(judge, bar, status):
    found = judge([same(), other()], bar=bar)
    assert found.status == status
    assert ("1 of 2 (50.0 %) have the reference's" in found.reason) == (status == "failed")


@pytest.mark.parametrize("judge", JUDGES)
def test_no_answer_fails(judge):
    found = judge([pair(answer(), GapExportError("out of order"))])
    (row,) = found.rows
    assert found.status == "failed"
    assert row.candidate == (None if judge is judge_boxes else "error: out of order")


def test_rows_of_tokens_say_where_they_part_and_failures_come_first():
    found = judge_tokens([same(), tie(), other()])
    first, second = found.rows
    assert (first.step, first.margin, first.is_tie) == (1, 8.0, False)
    assert second.is_tie and second.step == 1 and 0 < second.margin < 1e-4
    assert (first.reference, first.candidate) == ("0 2", "1 2")
    found = judge_tokens([other()] * 50)
    assert len(found.rows) == MAX_ROWS and found.figures["questions"] == 50


def test_what_the_other_level_looks_at_is_not_looked_at():
    assert judge_tokens([pair(answer(), answer(box=MOVED))]).status == "passed"
    assert judge_boxes([other(box=BOX)]).status == "passed"


def test_another_box_fails_with_both_and_their_overlap():
    found = judge_boxes([same(), pair(answer(), answer(box=MOVED))])
    assert found.status == "failed"
    (row,) = found.rows
    assert (row.reference, row.candidate) == (BOX, MOVED)
    assert row.iou == pytest.approx(39 / 40)
    assert found.figures["mean_iou"] == pytest.approx((1 + 39 / 40) / 2)
    # As near as 0.95 is counted, and still another box.
    assert found.figures["share_over_95"] == 1.0


def test_a_tie_with_the_same_box_counts_once():
    logits = [[1.0, 1.0, 0.0]]
    found = judge_boxes([pair(answer(), answer((1, EOS)), logits), other()])
    assert (found.figures["equal"], found.figures["ties"]) == (1, 0)
    assert found.status == "failed"


def test_no_box_on_both_sides_is_agreement_and_on_one_is_not():
    neither = pair(answer(box=None), answer(box=None))
    assert judge_boxes([neither]).status == "passed"
    assert judge_boxes([neither]).figures["mean_iou"] == 1.0
    for one in (pair(answer(box=None), answer()), pair(answer(), answer(box=None))):
        assert judge_boxes([one]).status == "failed"
        assert judge_boxes([one]).figures["mean_iou"] == 0.0
