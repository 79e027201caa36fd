"""What is wrong with questions, found only when their images are open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gap_export.errors import UsageError
from gap_export.evaluation.datasets.annotations import check_box
from gap_export.evaluation.questions import Question, Unusable
from gap_export.evaluation.records import Record

Answers = Mapping[str, Mapping[str, Record]]


@dataclass(frozen=True, kw_only=True)
class Seen:
    """Questions, as their images show them.

    Attributes:
        questions: Those whose annotation fits the image, boxes cut at its border.
        unusable: Those to which no answer can be judged.
    """

    questions: tuple[Question, ...]
    unusable: tuple[Unusable, ...]


def compare_with_images(questions: Sequence[Question], answers: Answers) -> Seen:
    """Hold annotations against the images that were loaded.

    An image of another size than annotated is another image, or one that was scaled: boxes say
    nothing about it. Where no size is annotated, a box may lie outside of the image.

    Args:
        questions: Those that were asked.
        answers: By setting and question.

    Raises:
        UsageError: none of them fits, or none could be asked.
    """
    given_to = {one.id: [records[one.id] for records in answers.values()] for one in questions}
    if all(record.error is not None for given in given_to.values() for record in given):
        question = questions[0]
        failed = given_to[question.id][0]
        raise UsageError(
            "none of the expressions could be asked",
            seen=f"{question.id}: {failed.error}",
            # Other expressions are another data set; an image that was broken is asked again.
            fix="correct the expressions; with --records name another folder then"
            if failed.fault == "refused expression"
            else "repair the images",
        )
    fitting: list[Question] = []
    unusable: list[Unusable] = []
    for question in questions:
        given = given_to[question.id]
        size = next((record.image_size for record in given if record.error is None), None)
        checked = check_box(question.box, size)
        if size is None or size == question.image_size:
            fitting.append(question)
        elif question.image_size is not None:
            detail = f"annotated {_sides(question.image_size)}, it is {_sides(size)}"
            unusable.append(Unusable.of(question, "picture of another size", detail))
        elif isinstance(checked, str):
            edges = ", ".join(f"{edge:g}" for edge in question.box)
            unusable.append(Unusable.of(question, checked, f"box {edges}, image {_sides(size)}"))
        else:
            fitting.append(replace(question, box=checked))
    if not fitting:
        first = unusable[0]
        raise UsageError(
            "none of the annotations fits its image",
            seen=f"{first.question_id}: {first.reason}, {first.detail}",
            fix="put the images that were annotated, as they were, where these are",
        )
    return Seen(questions=tuple(fitting), unusable=tuple(unusable))


def failed_questions(questions: Sequence[Question], answers: Answers) -> tuple[Unusable, ...]:
    """Questions that could not be asked, in one setting at least: what each of them met.

    Args:
        questions: Those that were asked.
        answers: By setting and question.
    """
    found = []
    for question in questions:
        errors = {
            name: records[question.id]
            for name, records in answers.items()
            if records[question.id].error is not None
        }
        if errors:
            first = next(iter(errors.values()))
            where = "" if len(errors) == len(answers) else f" ({', '.join(errors)} alone)"
            reason = first.fault or "broken picture"
            found.append(Unusable.of(question, reason, f"{first.error}{where}"))
    return tuple(found)


def _sides(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
