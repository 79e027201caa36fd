"""Frames: which rectangle of an image a set of coordinates, or a grid, refers to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gap_export.spec.manifest import BoxSpec, GridSpec, ImageSpec
from gap_export.spec.tiles import TileLayout

Box = tuple[float, float, float, float]
Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A rectangle in pixels of the image; it may reach beyond the image's edges."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class ImageGeometry:
    """An image as displayed (rotation by EXIF applied), and how it was prepared.

    Attributes:
        width: Pixels.
        height: Pixels.
        canvas: (height, width) in pixels of what it was fitted to and cut from, or of which of
            several canvases it was squashed to; None without either.
    """

    width: int
    height: int
    canvas: Size | None = None

    def token_grid(self, spec: ImageSpec, grid: GridSpec) -> tuple[int, int]:
        """Rows and columns of its visual tokens, on the canvas that it is squashed to."""
        return spec.grids[self.canvas_number(spec)] if spec.grids else (grid.rows, grid.cols)

    def canvas_number(self, spec: ImageSpec) -> int:
        """Which of several canvases it is squashed to, in the order of ``ImageSpec.grids``."""
        assert self.canvas is not None, "the preparation has chosen one"
        return canvas_sizes(spec).index(self.canvas)

    def box_frame(self, spec: BoxSpec) -> Frame:
        """What the answer's coordinates are relative to."""
        return self.padded_square if spec.frame == "padded_square" else self.whole

    def tiles_frame(self, spec: ImageSpec, layout: TileLayout) -> Frame:
        """What the joined grid of the tiles covers, its rows and columns of padding left out."""
        assert self.canvas is not None, "an image without a canvas has no tiles"
        height, width = fitted_size((self.height, self.width), self.canvas)
        # Pixels of the image per pixel of the canvas, and canvas pixels per token.
        across, down = self.width / width, self.height / height
        token_width, token_height = spec.width / layout.cols, spec.height / layout.rows
        return Frame(
            left=(layout.first_col * token_width - (self.canvas[1] - width) // 2) * across,
            top=(layout.first_row * token_height - (self.canvas[0] - height) // 2) * down,
            width=layout.num_cols * token_width * across,
            height=layout.num_rows * token_height * down,
        )

    @property
    def whole(self) -> Frame:
        """The image."""
        return Frame(left=0, top=0, width=self.width, height=self.height)

    @property
    def padded_square(self) -> Frame:
        """The image in the middle of a square."""
        side = max(self.width, self.height)
        left, top = (side - self.width) // 2, (side - self.height) // 2
        return Frame(left=-left, top=-top, width=side, height=side)


def canvas_sizes(spec: ImageSpec) -> list[Size]:
    """(height, width) of each of several canvases, in the order of ``ImageSpec.grids``."""
    height, width = token_size(spec)
    return [(rows * height, cols * width) for rows, cols in spec.grids]


def token_size(spec: ImageSpec) -> Size:
    """Height and width in pixels of the place of a visual token."""
    rows, cols = spec.grids[0]
    return spec.height // rows, spec.width // cols


def choose_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """The canvas that shows most of an image's detail, and of those the one with least padding.

    Args:
        size: (height, width).
        canvases: At least one; the first of equals wins.
    """

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / size[1], canvas[0] / size[0])
        shown = int(size[1] * scale) * int(size[0] * scale)
        # Enlarging an image adds no detail.
        effective = min(shown, size[0] * size[1])
        return effective, effective - canvas[0] * canvas[1]

    return max(canvases, key=merit)


def nearest_canvas(size: Size, canvases: Sequence[Size]) -> Size:
    """The canvas whose aspect ratio is nearest to an image's (InternVL-1.5, arXiv 2404.16821).

    Of two that are equally near, which those of one shape are, the one further back is taken if it
    has less than twice the image's pixels.

    Args:
        size: (height, width).
        canvases: At least one, smaller ones first.
    """
    (height, width), found = size, canvases[0]
    for canvas in canvases[1:]:
        off, least = (abs(width / height - w / h) for h, w in (canvas, found))
        if off < least or (off == least and 2 * width * height > canvas[0] * canvas[1]):
            found = canvas
    return found


def fitted_size(size: Size, canvas: Size) -> Size:
    """Size of an image that just fits a canvas, its aspect kept; rounded up, at least one pixel."""
    down, across = canvas[0] / size[0], canvas[1] / size[1]
    if across < down:
        return min(math.ceil(size[0] * across), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(size[1] * down), canvas[1])
