"""Answers judged under a protocol."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gap_export.errors import GapExportError
from gap_export.evaluation.protocols import Protocol
from gap_export.evaluation.questions import Question
from gap_export.evaluation.records import Record
from gap_export.runtime.boxes import parse_box
from gap_export.spec.manifest import BoxSpec

_MAX_NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Score:
    """One judged answer.

    Attributes:
        question_id: Of the question.
        iou: By the protocol, in 0..1; 0 where it read no box.
        parsed: Whether the protocol read a box.
        hit: Whether the answer is right at IoU 0.5.
        exact: Whether a box is written in the model's syntax. One that is parsed and not exact was
            read with tolerance.
    """

    question_id: str
    iou: float
    parsed: bool
    hit: bool
    exact: bool


def score_records(
    records: Iterable[Record],
    questions: Sequence[Question],
    protocol: Protocol,
    box_spec: BoxSpec,
) -> list[Score]:
    """Judge the answer to each question.

    Args:
        records: One for each question, in any order.
        questions: What was asked.
        protocol: By which it is judged.
        box_spec: Of the model that answered.

    Returns:
        One score for each question, in the questions' order: all of them are the denominator.

    Raises:
        GapExportError: a question without a record or with two, or a record of no question.
    """
    by_id: dict[str, Record] = {}
    wrong: dict[str, list[str]] = {"answered twice": [], "not answered": [], "not asked": []}
    for record in records:
        if record.question_id in by_id:
            wrong["answered twice"].append(record.question_id)
        by_id[record.question_id] = record
    asked = {question.id for question in questions}
    wrong["not answered"] = [question.id for question in questions if question.id not in by_id]
    wrong["not asked"] = [each for each in by_id if each not in asked]
    _refuse(wrong)
    return [_score(by_id[each.id], each, protocol, box_spec) for each in questions]


def _score(record: Record, question: Question, protocol: Protocol, box_spec: BoxSpec) -> Score:
    iou = protocol.iou(record, question, box_spec)
    return Score(
        question_id=question.id,
        iou=iou,
        parsed=protocol.read(record, box_spec) is not None,
        hit=protocol.is_hit(iou),
        exact=parse_box(record.text, box_spec) is not None,
    )


def _refuse(wrong: dict[str, list[str]]) -> None:
    """An accuracy over other questions than those asked means nothing.

    Raises:
        GapExportError: there is one.
    """
    seen = [
        f"{len(ids)} {what} ({', '.join(ids[:_MAX_NAMED])}{', ...' if ids[_MAX_NAMED:] else ''})"
        for what, ids in wrong.items()
        if ids
    ]
    if seen:
        raise GapExportError(
            "the answers are not those to the questions",
            seen="; ".join(seen),
            allowed="one answer to each question",
            fix="evaluate again, without the answers that were kept",
        )
