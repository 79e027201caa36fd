"""Sheets of drawn answers, side by side, with titles, the true boxes, and a legend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from gap_export.evaluation.refshapes import Expression, Scene
from gap_export.parity.metrics import intersection_over_union
from gap_export.runtime.drawing import draw_grounding, heat_scale
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.session import GroundingSession

# A README shows a sheet about half as large: letters are as large as its text then.
TEXT, SMALL = 30, 26
GAP = 14
TRUE_COLOR, FOUND_COLOR = (0, 214, 255), (255, 225, 0)
_INK, _DROPPED, _KEPT = "#222222", (104, 104, 104), (60, 130, 80)
_DASH, _PAUSE, _LINE = 12, 8, 4

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A drawn answer.

    Attributes:
        drawing: From ``draw_grounding``, without a caption.
        title: A line above it; may be empty.
        note: A line below it; may be empty.
    """

    drawing: Image.Image
    title: str = ""
    note: str = ""


def draw_answer(
    session: GroundingSession, scene: Scene, asked: Expression
) -> tuple[Image.Image, Grounding, float]:
    """Ask, and draw the answer with the true box; the answer and its IoU as well."""
    answer = session.ground(scene.image, asked.text)
    drawing = draw_grounding(scene.image, answer, caption=False)
    truth = scene.objects[asked.target].box
    add_true_box(drawing, truth, drawing.width / scene.image.shape[1])
    return drawing, answer, intersection_over_union(answer.box, truth) if answer.box else 0.0


def add_true_box(drawing: Image.Image, box: Box, scale: float) -> None:
    """Draw the true box, dashed and just outside of where a found one would be.

    Args:
        drawing: Changed.
        box: Left, top, right and bottom in pixels of the image before it was scaled.
        scale: How much larger the image is in the drawing.
    """
    limits = (drawing.width - 1, drawing.height - 1)
    left, top = (max(2, round(v * scale) - _LINE - 1) for v in box[:2])
    right, bottom = (
        min(limit - 2, round(v * scale) + _LINE + 1)
        for v, limit in zip(box[2:], limits, strict=True)
    )
    pen = ImageDraw.Draw(drawing)
    for color, width in (("black", _LINE + 3), (TRUE_COLOR, _LINE)):
        for x in range(left, right, _DASH + _PAUSE):
            for y in (top, bottom):
                pen.line((x, y, min(x + _DASH, right), y), fill=color, width=width)
        for y in range(top, bottom, _DASH + _PAUSE):
            for x in (left, right):
                pen.line((x, y, x, min(y + _DASH, bottom)), fill=color, width=width)


def make_sheet(
    rows: Sequence[tuple[str, Sequence[Tile]]],
    *,
    width: int,
    heading: str = "",
    heat: bool = False,
    legend: bool = True,
) -> Image.Image:
    """Rows of tiles on white.

    Args:
        rows: The label of each row, which may be empty, and its tiles.
        width: The width of a tile, which its drawing is scaled to.
        heading: A line above all.
        heat: Whether there are heat maps, which the legend then explains.
        legend: Whether there is one.
    """
    columns = max(len(tiles) for _, tiles in rows)
    heights = [_row_height(label, tiles, width) for label, tiles in rows]
    top = _line(TEXT) + GAP if heading else 0
    size = (columns * (width + GAP) - GAP, top + sum(heights) + _line(SMALL) * legend)
    sheet = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(sheet)
    if heading:
        pen.text((0, 0), heading, font=_font(TEXT), fill=_INK)
    for (label, tiles), height in zip(rows, heights, strict=True):
        below = top
        if label:
            fits = next(s for s in range(TEXT, 0, -1) if _font(s).getlength(label) <= sheet.width)
            pen.text((0, below), label, font=_font(fits), fill=_INK)
            below += _line(TEXT)
        for number, tile in enumerate(tiles):
            _put_tile(sheet, tile, (number * (width + GAP), below), width)
        top += height
    if legend:
        _put_legend(sheet, top, heat=heat)
    return sheet


def _row_height(label: str, tiles: Sequence[Tile], width: int) -> int:
    drawn = max(round(t.drawing.height * width / t.drawing.width) for t in tiles)
    lines = any(t.title for t in tiles) + any(t.note for t in tiles)
    return drawn + lines * _line(SMALL) + (_line(TEXT) if label else 0) + 2 * GAP


def _put_tile(sheet: Image.Image, tile: Tile, place: tuple[int, int], width: int) -> None:
    pen, font = ImageDraw.Draw(sheet), _font(SMALL)
    left, top = place
    if tile.title:
        # A long one in smaller letters.
        size = next(s for s in range(SMALL, 0, -1) if _font(s).getlength(tile.title) <= width)
        pen.text((left, top + SMALL - size), tile.title, font=_font(size), fill=_INK)
        top += _line(SMALL)
    height = round(tile.drawing.height * width / tile.drawing.width)
    sheet.paste(tile.drawing.resize((width, height), Image.Resampling.LANCZOS), (left, top))
    if tile.note:
        pen.text((left, top + height + 4), tile.note, font=font, fill=_INK)


def _put_legend(sheet: Image.Image, top: int, *, heat: bool) -> None:
    pen, font, side = ImageDraw.Draw(sheet), _font(SMALL), SMALL
    left = 0

    def found(box: Box) -> None:
        pen.rectangle(box, fill=_DROPPED, outline=FOUND_COLOR, width=_LINE)

    def true(box: Box) -> None:
        pen.rectangle(box, fill=_DROPPED)
        for x in range(int(box[0]), int(box[2]), _DASH + 4):
            for y in (box[1] + 1, box[3] - 1):
                pen.line((x, y, min(x + _DASH, box[2]), y), fill=TRUE_COLOR, width=_LINE)

    def kept(box: Box) -> None:
        pen.rectangle(box, fill=_DROPPED)
        inside = (box[0] + 9, box[1] + 4, box[2] - 9, box[3] - 4)
        pen.rectangle(inside, fill=_KEPT, outline="white", width=2)

    def dropped(box: Box) -> None:
        pen.rectangle(box, fill=_DROPPED)

    marks: list[tuple[Callable[[Box], None], str]] = [
        (found, "box found"),
        (true, "true box"),
        (kept, "kept token"),
        (dropped, "dropped"),
    ]
    for mark, words in marks:
        mark((left, top + 4, left + 1.6 * side, top + 4 + side))
        left += 2 * side
        pen.text((left, top), words, font=font, fill=_INK)
        left += round(font.getlength(words)) + 2 * side
    if heat:
        pen.text((left, top), "scores: lowest", font=font, fill=_INK)
        left += round(font.getlength("scores: lowest ")) + 4
        scale = heat_scale(side)
        sheet.paste(scale, (left, top + 4))
        pen.text((left + scale.width + 10, top), "highest", font=font, fill=_INK)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _line(size: int) -> int:
    return round(1.4 * size)
