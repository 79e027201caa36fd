"""Every question has one answer, and all of them count."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gap_export.errors import GapExportError
from gap_export.evaluation.protocols import PROTOCOLS
from gap_export.evaluation.scoring import Score, score_records
from tests.evaluation.answers import PADDED, question, record

TRUTH = (0.0, 0.0, 50.0, 100.0)
SIZE = (100, 100)
ANSWERS = {
    "right": "[0.0, 0.0, 0.5, 1.0]",
    "tolerated": "(0.0, 0.0, 0.5, 1.0)",
    "half": "[0.0, 0.0, 0.25, 1.0]",
    "none": "I do not see it.",
}
QUESTIONS = [replace(question(TRUTH, SIZE), id=name) for name in ANSWERS]
RECORDS = [replace(record(text, PADDED, SIZE), question_id=name) for name, text in ANSWERS.items()]


def test_answers_are_judged_in_the_order_of_the_questions():
    assert score_records(reversed(RECORDS), QUESTIONS, PROTOCOLS["tolerant"], PADDED) == [
        Score(question_id="right", iou=1.0, parsed=True, hit=True, exact=True),
        Score(question_id="tolerated", iou=1.0, parsed=True, hit=True, exact=False),
        Score(question_id="half", iou=0.5, parsed=True, hit=False, exact=True),
        Score(question_id="none", iou=0.0, parsed=False, hit=False, exact=False),
    ]


def test_same_answers_are_judged_otherwise_by_another_protocol():
    scores = score_records(RECORDS, QUESTIONS, PROTOCOLS["lmms"], PADDED)
    assert [score.parsed for score in scores] == [True, False, True, False]
    assert [score.hit for score in scores] == [True, False, True, False]


@pytest.mark.parametrize(
    ("records", "seen"),
    [
        (RECORDS[1:], r"1 not answered \(right\)"),
        ([], r"4 not answered \(right, tolerated, half, \.\.\.\)"),
        ([*RECORDS, RECORDS[0]], r"1 answered twice \(right\)"),
        ([*RECORDS, replace(RECORDS[0], question_id="x")], r"1 not asked \(x\)"),
    ],
)
def test_answers_to_other_questions_are_refused(records, seen):
    with pytest.raises(GapExportError, match=seen):
        score_records(records, QUESTIONS, PROTOCOLS["tolerant"], PADDED)


def test_nothing_asked_is_nothing_judged():
    assert score_records([], [], PROTOCOLS["tolerant"], PADDED) == []
