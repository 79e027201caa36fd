"""Questions and answers without a model."""

from __future__ import annotations

from pathlib import Path

from gap_export.evaluation.questions import ImageSource, Question
from gap_export.evaluation.records import Record
from gap_export.runtime.boxes import parse_answer, to_pixels
from gap_export.runtime.images.geometry import ImageGeometry
from gap_export.spec.manifest import BoxSpec

PADDED = BoxSpec(syntax="bracketed", scale=1.0, frame="padded_square")
WHOLE = BoxSpec(syntax="bracketed", scale=1.0, frame="image")
ANGLED = BoxSpec(syntax="angled", scale=100.0, frame="image")


def question(box, size=(640, 480)) -> Question:
    return Question(
        id="7-0",
        image_id="7",
        image=ImageSource(path=Path("7.jpg")),
        expression="the cup",
        box=box,
        image_size=size,
        kind=None,
        split="val",
    )


def record(text: str, spec: BoxSpec, size=(640, 480)) -> Record:
    """The answer as the evaluation keeps it."""
    parsed = parse_answer(text, spec)
    geometry = ImageGeometry(width=size[0], height=size[1])
    return Record(
        question_id="7-0",
        text=text,
        fractions=None if parsed is None else parsed.fractions,
        box=None if parsed is None else to_pixels(parsed.fractions, spec, geometry),
        image_size=size,
        num_kept_tokens=4,
        num_visual_tokens=9,
    )
