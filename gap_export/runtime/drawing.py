"""Drawings of answers: the box, and which visual tokens the model got to see."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from gap_export.errors import OutputError
from gap_export.outputs import DRAWING_SOFTWARE, NO_RULE, OutputRule
from gap_export.runtime.grounding import Grounding, TokenGrid
from gap_export.runtime.images.geometry import Box, Frame
from gap_export.runtime.images.image import ColorOrder, ImageFrame, ImageInput, load_image

DRAWING = "the drawing"
# EXIF 2.32, table 4.
_SOFTWARE_TAG = 0x0131
_SUFFIXES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
# Output pixels of the longer side; smaller images are enlarged, larger ones shrunk.
_MIN_SIDE, _MAX_SIDE = 512, 2048
_BOX_COLOR = (255, 225, 0)
_HALO_COLOR = (0, 0, 0)
_OUTLINE_COLOR = (255, 255, 255)
# Of several expressions; black words can be read on each.
_BOX_COLORS = (_BOX_COLOR, (0, 230, 255), (255, 130, 200), (130, 255, 120), (255, 165, 60))
_CAPTION_COLOR, _CAPTION_BACKGROUND = (235, 235, 235), (24, 24, 24)
# Pixels that a caption needs for the scale of the heat map and both its ends.
_LEAST_CAPTION = 400
# Dropped parts are gray and near this brightness, by this share: a dark image must not end in black
# and a bright one not in white, so that what was dropped stays visible.
_DROPPED_COLOR, _DROPPED_SHARE = (104, 104, 104), 0.6
_WHITE = (255, 255, 255)
# Of an image cut into tiles the base tile is drawn beside it, at this fraction of its size.
_ASIDE = 0.4
# How much of a heat map is color, and not the image.
_HEAT = 0.65


def draw_grounding(
    image: ImageInput,
    grounding: Grounding,
    *,
    pad_color: tuple[int, int, int] = _WHITE,
    frame: ImageFrame = "upright",
    allow_damaged: bool = False,
    color: ColorOrder = "rgb",
    caption: bool = True,
) -> Image.Image:
    """The image with what was dropped in pale gray, kept tokens outlined, and the box.

    Where the pruner ranks by scores, a heat map of them stands beside or below: black is the lowest
    of this image, then red, yellow, and white the highest; the caption has its scale.

    An image that was cut into tiles shows the tokens of the tiles; where some were dropped, those
    of the base tile, or thumbnail, are shown on a smaller copy beside or below it.

    Args:
        image: The image that was asked about.
        grounding: The answer.
        pad_color: RGB 0..255, shown where the image is transparent.
        frame: The one it was asked about in; ``allow_damaged`` and ``color`` likewise.
        allow_damaged: See ``frame``.
        color: See ``frame``.
        caption: Write the expression, the number of tokens and the scale of the heat map below.

    Returns:
        RGB; without the caption the upper left corner is that of the image, enlarged or shrunk.

    Raises:
        ImageError: the image cannot be used.
    """
    shown = load_image(
        image, pad_color=pad_color, frame=frame, allow_damaged=allow_damaged, color=color
    )
    longest = max(shown.size)
    scale = min(max(longest, _MIN_SIDE), _MAX_SIDE) / longest
    # An extremely thin image has tiles that show nothing of it.
    *others, main = [grid for grid in grounding.tokens if grid.rows * grid.cols > 0]
    drawing = _draw_view(shown, main, grounding, scale)
    scores = None
    if not all(grid.is_whole for grid in (*others, main)):
        scores = main.scores
        aside = [_draw_view(shown, grid, grounding, scale * _ASIDE) for grid in others]
        if scores is not None:
            aside.append(_draw_scores(shown, main, scores, scale * _ASIDE))
        for other in aside:
            # Without a caption it is for a white page.
            drawing = _put_aside(drawing, other, _CAPTION_BACKGROUND if caption else _WHITE)
    return _with_caption(drawing, _caption(grounding), scores) if caption else drawing


def draw_boxes(image: Image.Image, groundings: Sequence[Grounding]) -> Image.Image:
    """A copy of a frame with the boxes of several expressions, each with its words and score.

    Args:
        image: RGB, as displayed.
        groundings: Answers about it; those without a box, and those not found, are left out.
    """
    drawing = image.copy()
    pen = ImageDraw.Draw(drawing)
    stroke = max(2, max(drawing.size) // 320)
    font = ImageFont.load_default(size=max(10, max(drawing.size) // 45))
    found = [
        (number, grounding.expression.strip(), one)
        for number, grounding in enumerate(groundings)
        for one in grounding.boxes
        if one.found is not False
    ]
    for number, expression, one in found:
        color = _BOX_COLORS[number % len(_BOX_COLORS)]
        corners = _scaled(one.box, 1.0)
        pen.rectangle(corners, outline=color, width=stroke)
        # No letter is narrower than a pixel.
        words = expression[: drawing.width]
        words = words if one.score is None else f"{words} {one.score:.2g}"
        left, top, right, bottom = font.getbbox(words)
        # Above the box where there is room, else within it.
        above = corners[1] - (bottom - top) - 2 * stroke
        place = (corners[0], above if above >= 0 else corners[1])
        label = (*place, place[0] + right - left + 2 * stroke, place[1] + bottom - top + 2 * stroke)
        pen.rectangle(label, fill=color)
        origin = (place[0] + stroke - left, place[1] + stroke - top)
        pen.text(origin, words, font=font, fill=_HALO_COLOR)
    return drawing


def save_drawing(drawing: Image.Image, path: str | Path, *, rule: OutputRule = NO_RULE) -> Path:
    """Write a drawing, by the rule of :mod:`gap_export.outputs`; an earlier one is replaced.

    Args:
        drawing: From :func:`draw_grounding`.
        path: Ends in .png, .jpg, .jpeg or .webp.
        rule: What the file must stay away from.

    Returns:
        The path.

    Raises:
        OutputError: another suffix, or the file cannot, or must not, be written.
    """
    target = Path(path)
    kind = check_drawing_path(target, rule)
    exif = Image.Exif()
    exif[_SOFTWARE_TAG] = DRAWING_SOFTWARE
    stream = io.BytesIO()
    drawing.save(stream, format=kind, exif=exif)
    rule.write(DRAWING, target, stream.getvalue())
    return target


def check_drawing_path(path: Path, rule: OutputRule = NO_RULE) -> str:
    """Pillow's name of the format a drawing would be saved in.

    Raises:
        OutputError: another suffix than those of :func:`save_drawing`, or the file could not, or
            must not, be written.
    """
    kind = _SUFFIXES.get(path.suffix.lower())
    if kind is None:
        raise OutputError(
            "drawings are not saved in that format", seen=path, allowed=", ".join(_SUFFIXES)
        )
    rule.check({DRAWING: path})
    return kind


def token_box(index: int, grid: tuple[int, int], frame: Frame) -> Box:
    """Where in the image a visual token comes from, in pixels; padding lies outside.

    Args:
        index: 0..N-1, raster order.
        grid: Rows and columns.
        frame: What the grid covers.
    """
    row, col = divmod(index, grid[1])
    width, height = frame.width / grid[1], frame.height / grid[0]
    left, top = frame.left + col * width, frame.top + row * height
    return left, top, left + width, top + height


def _draw_view(
    image: Image.Image, grid: TokenGrid, grounding: Grounding, scale: float
) -> Image.Image:
    """The image, scaled, with one grid's tokens and the box."""
    drawing = _resized(image, scale)
    if not grid.is_whole:
        size = (grid.rows, grid.cols)
        places = (token_box(index, size, grid.frame) for index in sorted(grid.kept))
        cells = [_inclusive(_scaled(place, scale)) for place in places]
        mask = Image.new("L", drawing.size, 0)
        mask_pen = ImageDraw.Draw(mask)
        for cell in cells:
            mask_pen.rectangle(cell, fill=255)
        gray = drawing.convert("L").convert("RGB")
        even = Image.new("RGB", drawing.size, _DROPPED_COLOR)
        drawing = Image.composite(drawing, Image.blend(gray, even, _DROPPED_SHARE), mask)
        pen = ImageDraw.Draw(drawing)
        for cell in cells:
            pen.rectangle(cell, outline=_OUTLINE_COLOR)
    if grounding.box is not None:
        stroke = max(2, max(drawing.size) // 170)
        pen = ImageDraw.Draw(drawing)
        corners = _scaled(grounding.box, scale)
        left, top, right, bottom = corners
        halo = (left - 1, top - 1, right + 1, bottom + 1)
        pen.rectangle(halo, outline=_HALO_COLOR, width=stroke + 2)
        pen.rectangle(corners, outline=_BOX_COLOR, width=stroke)
    return drawing


def _draw_scores(
    image: Image.Image, grid: TokenGrid, scores: tuple[float, ...], scale: float
) -> Image.Image:
    """The image in gray under its scores as colors; kept tokens outlined."""
    drawing = _resized(image, scale).convert("L").convert("RGB")
    colors = Image.new("RGB", drawing.size)
    pen = ImageDraw.Draw(colors)
    cells = [
        _inclusive(_scaled(token_box(index, (grid.rows, grid.cols), grid.frame), scale))
        for index in range(len(scores))
    ]
    least, most = min(scores), max(scores)
    for cell, score in zip(cells, scores, strict=True):
        pen.rectangle(cell, fill=heat_color((score - least) / ((most - least) or 1.0)))
    drawing = Image.blend(drawing, colors, _HEAT)
    pen = ImageDraw.Draw(drawing)
    for index in grid.kept:
        pen.rectangle(cells[index], outline=_OUTLINE_COLOR)
    return drawing


def heat_color(share: float) -> tuple[int, int, int]:
    """RGB 0..255 of 0..1: black, red, yellow, white."""
    red, green, blue = (
        min(max(round(255 * (3 * share - start)), 0), 255) for start in (0.0, 1.0, 2.0)
    )
    return red, green, blue


def _put_aside(
    drawing: Image.Image, other: Image.Image, background: tuple[int, int, int]
) -> Image.Image:
    """``other`` below a wide drawing, beside a tall one."""
    gap = max(4, max(drawing.size) // 128)
    if drawing.width >= drawing.height:
        size = (drawing.width, drawing.height + gap + other.height)
        place = (0, drawing.height + gap)
    else:
        size = (drawing.width + gap + other.width, drawing.height)
        place = (drawing.width + gap, 0)
    canvas = Image.new("RGB", size, background)
    canvas.paste(drawing)
    canvas.paste(other, place)
    return canvas


def _caption(grounding: Grounding) -> list[str]:
    tokens = f"{len(grounding.keep_indices)} of {grounding.num_visual_tokens} visual tokens"
    nothing = "" if grounding.box is not None else " (no box)"
    lines = [f"{grounding.expression.strip()}{nothing} | {tokens}"]
    grids = grounding.tokens
    if len(grids) > 1:
        parts = [f"{grid.view} {len(grid.kept)} of {grid.rows * grid.cols}" for grid in grids]
        newlines = sum(tile.num_newline_tokens for grid in grids for tile in grid.tiles)
        lines.append(", ".join([*parts, *([f"newlines {newlines}"] if newlines else [])]))
    return lines


def _with_caption(
    drawing: Image.Image, lines: list[str], scores: tuple[float, ...] | None
) -> Image.Image:
    width = max(drawing.width, _LEAST_CAPTION)
    font = ImageFont.load_default(size=max(14, width // 34))
    pad = max(4, width // 64)
    upper, lower = font.getbbox("Ag")[1::2]
    line_height = round(lower - upper) + pad
    strip = (len(lines) + (scores is not None)) * line_height + pad
    canvas = Image.new("RGB", (width, drawing.height + strip), _CAPTION_BACKGROUND)
    canvas.paste(drawing)
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        # No letter is narrower than two pixels: what is beyond cannot fit anyway.
        text = line[: width // 2]
        while len(text) > 1 and font.getlength(text) > width - 2 * pad:
            text = f"{text[:-2]}\N{HORIZONTAL ELLIPSIS}"
        top = drawing.height + pad + number * line_height - upper
        pen.text((pad, top), text, font=font, fill=_CAPTION_COLOR)
    if scores is not None:
        top = drawing.height + pad + len(lines) * line_height
        least, most = f"scores from {min(scores):.3g}", f"to {max(scores):.3g}"
        scale, left = heat_scale(line_height - pad), 2 * pad + round(font.getlength(least))
        pen.text((pad, top - upper), least, font=font, fill=_CAPTION_COLOR)
        canvas.paste(scale, (left, top))
        right = left + scale.width + pad
        pen.text((right, top - upper), most, font=font, fill=_CAPTION_COLOR)
    return canvas


def heat_scale(height: int) -> Image.Image:
    """The colors of a heat map from the lowest score at the left to the highest at the right."""
    scale = Image.new("RGB", (8 * height, height))
    pen = ImageDraw.Draw(scale)
    for x in range(scale.width):
        pen.line((x, 0, x, height), fill=heat_color(x / (scale.width - 1)))
    pen.rectangle((0, 0, scale.width - 1, height - 1), outline=_CAPTION_COLOR)
    return scale


def _resized(image: Image.Image, scale: float) -> Image.Image:
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _scaled(box: Box, scale: float) -> Box:
    x1, y1, x2, y2 = (round(value * scale) for value in box)
    return x1, y1, x2, y2


def _inclusive(box: Box) -> Box:
    """As Pillow's rectangles take it: with the last pixel; at least one pixel."""
    return box[0], box[1], max(box[0], box[2] - 1), max(box[1], box[3] - 1)
