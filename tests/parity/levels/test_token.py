"""Greedy tokens: equal, tied, or other."""

from __future__ import annotations

import pytest

from gap_export.errors import GapExportError
from gap_export.parity.levels.token import MAX_ROWS, judge_tokens
from tests.parity.levels.pairs import answer, other, pair, same, tie


def test_equal_answers_and_ties_pass():
    found = judge_tokens([same(), tie()])
    assert found.status == "passed" and not found.reason
    assert found.figures == {"questions": 2, "equal": 1, "ties": 1}
    (row,) = found.rows
    assert row.is_tie and row.step == 1 and 0 < row.margin < 1e-4


def test_another_answer_fails_with_its_step_and_margin():
    found = judge_tokens([same(), tie(), other()])
    assert found.status == "failed"
    assert found.reason.startswith("2 of 3 (66.7 %)")
    first, _ = found.rows
    # What fails comes first.
    assert (first.step, first.margin, first.is_tie) == (1, 8.0, False)
    assert (first.reference, first.candidate) == ("0 2", "1 2")


@pytest.mark.parametrize(("bar", "status"), [(0.75, "passed"), (0.76, "failed"), (0.0, "passed")])
def test_the_bar_is_a_share_of_the_questions(bar, status):
    assert judge_tokens([same(), same(), same(), other()], bar=bar).status == status


def test_a_bar_that_is_met_exactly_is_met():
    pairs = [same()] * 7 + [other()] * 93
    assert judge_tokens(pairs, bar=0.07).status == "passed"


def test_no_answer_is_told_with_its_reason():
    (row,) = judge_tokens([pair(answer(), GapExportError("out of order"))]).rows
    assert row.candidate == "error: out of order" and row.margin is None


def test_only_the_first_few_are_told():
    found = judge_tokens([other()] * 50)
    assert len(found.rows) == MAX_ROWS and found.figures["questions"] == 50


def test_boxes_are_not_looked_at():
    moved = pair(answer(), answer(box=(0.0, 0.0, 1.0, 1.0)))
    assert judge_tokens([moved]).status == "passed"
