"""Frames: which rectangle of a picture a set of coordinates, or a grid, refers to."""

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
    """A rectangle in pixels of the picture; it may reach beyond the picture's edges.

    Attributes:
        left: x of its left edge, 0 at the picture's left edge.
        top: y of its upper edge.
        width: Pixels.
        height: Pixels.
    """

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class ImageGeometry:
    """A picture as displayed (rotation by EXIF applied), and how it was prepared.

    Attributes:
        width: Pixels.
        height: Pixels.
        canvas: (height, width) in pixels of what it was fitted to and cut from; None without tiles.
    """

    width: int
    height: int
    canvas: Size | None = None

    def input_frame(self, spec: ImageSpec) -> Frame:
        """What the vision encoder's first input, and so its grid of visual tokens, covers."""
        from gap_export.runtime.images.preparations import find_preparation

        return find_preparation(spec.preparation).frame(self)

    def box_frame(self, spec: BoxSpec) -> Frame:
        """What the answer's coordinates are relative to."""
        return self.padded_square if spec.frame == "padded_square" else self.whole

    def tile_layout(self, spec: ImageSpec, grid: GridSpec) -> TileLayout | None:
        """How the tokens of its tiles are joined; None without tiles."""
        if self.canvas is None:
            return None
        assert spec.tiles is not None, "a canvas is one of the tiles' resolutions"
        return TileLayout.for_image(
            self.width,
            self.height,
            rows=grid.rows,
            cols=grid.cols,
            tile_rows=self.canvas[0] // spec.height,
            tile_cols=self.canvas[1] // spec.width,
            follows=spec.tiles.follows,
        )

    def tiles_frame(self, spec: ImageSpec, layout: TileLayout) -> Frame:
        """What the joined grid of the tiles covers, its rows and columns of padding left out."""
        assert self.canvas is not None, "a picture without a canvas has no tiles"
        height, width = fitted_size((self.height, self.width), self.canvas)
        # Pixels of the picture per pixel of the canvas, and canvas pixels per token.
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


def choose_canvas(picture: Size, canvases: Sequence[Size]) -> Size:
    """The canvas that shows most of a picture's detail, and of those the one with least padding.

    Args:
        picture: (height, width).
        canvases: At least one; the first of equals wins.
    """

    def merit(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / picture[1], canvas[0] / picture[0])
        shown = int(picture[1] * scale) * int(picture[0] * scale)
        # Enlarging a picture adds no detail.
        effective = min(shown, picture[0] * picture[1])
        return effective, effective - canvas[0] * canvas[1]

    return max(canvases, key=merit)


def fitted_size(picture: Size, canvas: Size) -> Size:
    """Size of a picture that just fits a canvas, its aspect kept; rounded up, at least one pixel.

    Args:
        picture: (height, width).
        canvas: (height, width).
    """
    down, across = canvas[0] / picture[0], canvas[1] / picture[1]
    if across < down:
        return min(math.ceil(picture[0] * across), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(picture[1] * down), canvas[1])
