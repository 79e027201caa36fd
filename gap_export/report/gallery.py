"""Images of a gallery, embedded into the page, with the right box and those that were answered."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from PIL import Image

from gap_export.errors import ImageError, MissingDependencyError
from gap_export.evaluation.results import Box, EvaluationReport, GalleryItem, GalleryKind
from gap_export.report.document import Answer, Card, Shelf, Stroke
from gap_export.report.figures import BLUE, GREEN, INK, ORANGE, PURPLE, VERMILLION
from gap_export.report.panels import Panel, panels_of
from gap_export.runtime.images.image import load_image
from gap_export.visible import clean

TITLES: Mapping[GalleryKind, str] = MappingProxyType(
    {
        "flipped by GAP": "right with GAP, wrong with compact positions",
        "best": "where GAP did best",
        "worst": "where GAP did worst",
    }
)
# A page is read in a browser and sent by mail: pixels of the longer side, images in all.
_MAX_SIDE, _MAX_CARDS = 400, 60
# A drawn image, or one as small as those of RefShapes, would suffer from JPEG.
_MAX_LOSSLESS = 128
_QUALITY = 85
_WHITE = (255, 255, 255)
# How far a box may reach over the edge, so that it can be seen there.
_OUTSIDE = 4.0
# The right box is wider than the others, which are drawn over it and may well be the same.
_TRUTH = Stroke(label="right box", color=INK, width=7)
_STROKES: Mapping[str, Stroke] = MappingProxyType(
    {
        "gap": Stroke(label="GAP", color=BLUE, width=3),
        "gap+proportional": Stroke(label="GAP, proportional attention", color=PURPLE, width=3),
        "compact": Stroke(label="compact positions", color=VERMILLION, width=3, dashes="9 5"),
        "text-shifted": Stroke(label="text-shifted", color=ORANGE, width=3, dashes="4 4"),
        "none": Stroke(label="nothing pruned", color=GREEN, width=3, dashes="3 3"),
    }
)


def gallery_shelves(report: EvaluationReport) -> tuple[Shelf, ...]:
    """The gallery by reason, with images; an image that cannot be loaded any more says so.

    Args:
        report: Its text holds no control characters.
    """
    pairs = [one for one in panels_of(report.rows) if any(r.pruner != "none" for r in one.rows)]
    shown = [item for kind in TITLES for item in report.gallery if item.kind == kind][:_MAX_CARDS]
    shelves = []
    for kind, title in TITLES.items():
        cards = tuple(_card(item, pairs) for item in shown if item.kind == kind)
        if cards:
            drawn = [answer.stroke for card in cards for answer in card.answers if answer.stroke]
            strokes = tuple(dict.fromkeys((_TRUTH, *drawn)))
            shelves.append(Shelf(title=title, strokes=strokes, cards=cards))
    return tuple(shelves)


def _card(item: GalleryItem, pairs: Sequence[Panel]) -> Card:
    strokes = _strokes(item, pairs)
    drawn = [answer for answer in item.answers if answer.setting in strokes]
    others = [answer for answer in item.answers if answer.setting not in strokes]
    answers = tuple(
        Answer(
            stroke=strokes.get(one.setting),
            setting=one.setting,
            # Some protocols judge what lies outside the image, where no box is left to be drawn.
            iou="no box" if one.box is None and one.iou == 0 else f"IoU {one.iou:.2f}",
            text=one.text,
        )
        for one in (*drawn, *others)
    )
    ious = ", ".join(f"{one.setting}: {one.iou}" for one in answers[: len(drawn)])
    uri, problem, (width, height) = _embed(item)
    # All is drawn as if the longer side had so many pixels.
    unit = _MAX_SIDE / max(width, height)
    size = (round(width * unit, 2), round(height * unit, 2))
    boxes = [(_TRUTH, item.box), *((strokes[one.setting], one.box) for one in drawn)]
    return Card(
        question=item.question_id,
        expression=item.expression,
        alt=f"the image of question {item.question_id} with the right box. {ious}",
        uri=uri,
        problem=problem,
        size=size,
        boxes=tuple(
            (stroke, _place([edge * unit for edge in box], size))
            for stroke, box in boxes
            if box is not None and all(map(math.isfinite, box))
        ),
        answers=answers,
    )


def _place(box: Sequence[float], size: tuple[float, float]) -> Box:
    """Left, top, width and height of a box, cut a little outside of the image."""
    x1, x2 = sorted(min(max(x, -_OUTSIDE), size[0] + _OUTSIDE) for x in box[0::2])
    y1, y2 = sorted(min(max(y, -_OUTSIDE), size[1] + _OUTSIDE) for y in box[1::2])
    return round(x1, 2), round(y1, 2), round(x2 - x1, 2), round(y2 - y1, 2)


def _strokes(item: GalleryItem, pairs: Sequence[Panel]) -> dict[str, Stroke]:
    """How boxes are drawn, by setting: of those the gallery was chosen by, the first pair."""
    asked = {answer.setting for answer in item.answers}
    for pair in pairs:
        rows = [row for row in pair.rows if row.pruner != "none" and row.name in asked]
        if rows:
            return {row.name: _STROKES[row.positions] for row in rows}
    # Nothing was pruned.
    return {answer.setting: _STROKES["none"] for answer in item.answers[:1]}


def _embed(item: GalleryItem) -> tuple[str, str, tuple[int, int]]:
    """The image as a ``data:`` URI, or what is wrong with it; and its size as loaded."""
    try:
        image = load_image(item.image.load(), pad_color=_WHITE, frame=item.image.frame)
    except (ImageError, MissingDependencyError) as err:
        # The answers are still worth showing; the image was there when they were given.
        return "", clean(str(err)), (1, 1)
    size = image.size
    stream = io.BytesIO()
    if max(size) <= _MAX_LOSSLESS:
        kind = "png"
        image.save(stream, format="PNG", optimize=True)
    else:
        kind = "jpeg"
        image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
        image.save(stream, format="JPEG", quality=_QUALITY, optimize=True)
    encoded = base64.b64encode(stream.getvalue()).decode("ascii")
    return f"data:image/{kind};base64,{encoded}", "", size
