"""Pictures of answers for the page: each within it, with the right box and those answered."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from PIL import Image

from gap_export.errors import ImageError, MissingDependencyError
from gap_export.evaluation.results import (
    Box,
    EvaluationReport,
    GalleryAnswer,
    GalleryItem,
    GalleryKind,
)
from gap_export.report.evaluation.plots import GREEN
from gap_export.report.evaluation.words import GALLERY_TITLES, Panel, panels
from gap_export.report.parity.plots import BLUE, INK, VERMILLION
from gap_export.runtime.image import load_image
from gap_export.visible import clean

# A page is read in a browser and sent by mail: pixels of the longer side, pictures in all.
_MAX_SIDE, _MAX_CARDS = 400, 60
# A drawn picture, or one as small as those of RefShapes, would suffer from JPEG.
_MAX_LOSSLESS = 128
_QUALITY = 85
_WHITE = (255, 255, 255)
# Of the longer side, so that a box on the edge can be seen.
_MARGIN = 0.02
_KINDS: tuple[GalleryKind, ...] = ("flipped by GAP", "best", "worst")


@dataclass(frozen=True, kw_only=True)
class Stroke:
    """How a box is drawn; lengths are for a picture whose longer side is 400.

    Attributes:
        label: Whose box it is.
        color: Of the palette of Okabe and Ito.
        width: Of the line.
        dashes: Lengths of a dash and of the gap after it; empty for a line without gaps.
    """

    label: str
    color: str
    width: float
    dashes: tuple[float, ...] = ()


# The right box is wider than the others, which are drawn over it and may well be the same.
_TRUTH = Stroke(label="right box", color=INK, width=7)
_STROKES: Mapping[str, Stroke] = MappingProxyType(
    {
        "gap": Stroke(label="GAP", color=BLUE, width=3),
        "compact": Stroke(label="compact positions", color=VERMILLION, width=3, dashes=(9, 5)),
        "none": Stroke(label="nothing pruned", color=GREEN, width=3, dashes=(3, 3)),
    }
)
# White around each line, for pictures of its colour.
_HALO = 3.0


@dataclass(frozen=True, kw_only=True)
class Rectangle:
    """A box to be drawn, in pixels of the picture.

    Attributes:
        x: Left.
        y: Top.
        width: At least 0.
        height: At least 0.
        color: Of its line.
        line: Width of its line.
        halo: Width of the white line below it.
        dashes: Lengths of dashes and gaps, as SVG has them; empty for a line without gaps.
    """

    x: float
    y: float
    width: float
    height: float
    color: str
    line: float
    halo: float
    dashes: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A line below the picture.

    Attributes:
        stroke: How its box is drawn; None where it is not.
        setting: Its name.
        iou: In words: a number, or that there is no box.
        text: The model's.
    """

    stroke: Stroke | None
    setting: str
    iou: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """One question.

    Attributes:
        question: Its id.
        expression: What was asked.
        alt: The picture in words.
        uri: The picture as ``data:``; empty where it could not be loaded.
        problem: Why.
        width: Pixels of the picture as loaded.
        height: Likewise.
        margin: Pixels around it.
        rectangles: To be drawn over it, in this order.
        answers: Of the settings whose boxes are drawn, then of the others.
    """

    question: str
    expression: str
    alt: str
    uri: str
    problem: str
    width: int
    height: int
    margin: float
    rectangles: tuple[Rectangle, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """Questions that were chosen for the same reason.

    Attributes:
        title: Why.
        strokes: How boxes are drawn in its pictures.
        cards: At least one.
    """

    title: str
    strokes: tuple[Stroke, ...]
    cards: tuple[Card, ...]


def gallery_shelves(report: EvaluationReport) -> tuple[Shelf, ...]:
    """The gallery by reason, with pictures; one that cannot be loaded any more says so."""
    pairs = [panel for panel in panels(report.rows) if panel.row("compact") or panel.row("gap")]
    shown = [item for kind in _KINDS for item in report.gallery if item.kind == kind][:_MAX_CARDS]
    shelves = []
    for kind in _KINDS:
        cards = tuple(_card(item, pairs) for item in shown if item.kind == kind)
        if cards:
            drawn = [answer.stroke for card in cards for answer in card.answers if answer.stroke]
            strokes = tuple(dict.fromkeys((_TRUTH, *drawn)))
            shelves.append(Shelf(title=GALLERY_TITLES[kind], strokes=strokes, cards=cards))
    return tuple(shelves)


def _card(item: GalleryItem, pairs: list[Panel]) -> Card:
    strokes = _strokes(item, pairs)
    drawn = [answer for answer in item.answers if answer.setting in strokes]
    others = [answer for answer in item.answers if answer.setting not in strokes]
    answers = tuple(_answer(answer, strokes) for answer in (*drawn, *others))
    alt = ", ".join(f"{one.setting}: {one.iou}" for one in answers[: len(drawn)])
    uri, problem, size = _embed(item)
    boxes = [(_TRUTH, item.box), *((strokes[one.setting], one.box) for one in drawn)]
    placed = [_rectangle(stroke, box, size) for stroke, box in boxes if box is not None]
    return Card(
        question=clean(item.question_id),
        expression=clean(item.expression),
        alt=f"the picture of question {clean(item.question_id)} with the right box. {alt}",
        uri=uri,
        problem=problem,
        width=size[0],
        height=size[1],
        margin=_margin(size),
        rectangles=tuple(one for one in placed if one is not None),
        answers=answers,
    )


def _strokes(item: GalleryItem, pairs: list[Panel]) -> dict[str, Stroke]:
    """Whose boxes are drawn, and how, by setting: those the gallery was chosen by, the first."""
    asked = {answer.setting for answer in item.answers}
    for pair in pairs:
        rows = [row for row in (pair.row("compact"), pair.row("gap")) if row and row.name in asked]
        if rows:
            return {row.name: _STROKES[row.positions] for row in rows}
    # Nothing was pruned.
    return {answer.setting: _STROKES["none"] for answer in item.answers[:1]}


def _answer(answer: GalleryAnswer, strokes: dict[str, Stroke]) -> Answer:
    return Answer(
        stroke=strokes.get(answer.setting),
        setting=clean(answer.setting),
        # Some protocols judge what lies outside the picture, where no box is left to be drawn.
        iou="no box" if answer.box is None and answer.iou == 0 else f"IoU {answer.iou:.2f}",
        text=clean(answer.text),
    )


def _embed(item: GalleryItem) -> tuple[str, str, tuple[int, int]]:
    """The picture as a ``data:`` URI, or what is wrong with it; and its size as loaded."""
    try:
        picture = load_image(item.picture.load(), pad_color=_WHITE, frame=item.picture.frame)
    except (ImageError, MissingDependencyError) as err:
        # The answers are still worth showing; the picture was there when they were given.
        return "", clean(str(err)), (1, 1)
    size = picture.size
    stream = io.BytesIO()
    if max(size) <= _MAX_LOSSLESS:
        kind = "png"
        picture.save(stream, format="PNG", optimize=True)
    else:
        kind = "jpeg"
        picture.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
        picture.save(stream, format="JPEG", quality=_QUALITY, optimize=True)
    encoded = base64.b64encode(stream.getvalue()).decode("ascii")
    return f"data:image/{kind};base64,{encoded}", "", size


def _margin(size: tuple[int, int]) -> float:
    return _MARGIN * max(size)


def _rectangle(stroke: Stroke, box: Box, size: tuple[int, int]) -> Rectangle | None:
    """Within the picture and half its margin; None of what is no box."""
    if not all(map(math.isfinite, box)):
        return None
    outside = _margin(size) / 2
    left, right = (min(max(x, -outside), size[0] + outside) for x in (box[0], box[2]))
    top, bottom = (min(max(y, -outside), size[1] + outside) for y in (box[1], box[3]))
    unit = max(size) / _MAX_SIDE
    return Rectangle(
        x=round(min(left, right), 2),
        y=round(min(top, bottom), 2),
        width=round(abs(right - left), 2),
        height=round(abs(bottom - top), 2),
        color=stroke.color,
        line=round(stroke.width * unit, 2),
        halo=round((stroke.width + _HALO) * unit, 2),
        dashes=" ".join(f"{length * unit:.2f}" for length in stroke.dashes),
    )
