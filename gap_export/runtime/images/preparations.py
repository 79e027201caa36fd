"""How an image becomes what the vision encoder reads, and which part of the image that shows.

A family of another package brings a way of its own as a :class:`Preparation`, which it names in
:attr:`gap_export.spec.family.Family.preparations`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
from PIL import Image

from gap_export.errors import BundleError
from gap_export.plugins import load_object
from gap_export.runtime.images.geometry import (
    Frame,
    ImageGeometry,
    Size,
    canvas_sizes,
    choose_canvas,
    fitted_size,
    nearest_canvas,
    token_size,
)
from gap_export.spec.manifest import GridSpec, ImageSpec
from gap_export.spec.preparations import known_preparations
from gap_export.spec.tiles import TileLayout, TileStack

Views = list[Image.Image]
_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Canvas(NamedTuple):
    """What an image is fitted to, both sizes (height, width) in pixels.

    Attributes:
        size: The canvas; its tiles are as large as the vision encoder's inputs.
        fitted: What the image becomes on it.
    """

    size: Size
    fitted: Size


class Preparation(ABC):
    """One way to prepare an image."""

    @abstractmethod
    def views(self, image: Image.Image, spec: ImageSpec, canvas: Canvas | None) -> Views:
        """The vision encoder's inputs, each ``spec.width`` x ``spec.height`` pixels.

        Args:
            image: RGB. A very thin one was shrunk.
            spec: What the vision encoder reads.
            canvas: From :meth:`canvas`.
        """

    def canvas(self, size: Size, spec: ImageSpec) -> Canvas | None:  # noqa: ARG002
        """What an image of that (height, width) is fitted to and cut from, if at all."""
        return None

    def tile_layout(
        self,
        geometry: ImageGeometry,  # noqa: ARG002
        spec: ImageSpec,  # noqa: ARG002
        grid: GridSpec,  # noqa: ARG002
    ) -> TileLayout | TileStack | None:
        """How the tokens of an image's tiles are put in order; None of one that is not cut."""
        return None

    def frame(self, geometry: ImageGeometry) -> Frame:
        """What a view of the whole image covers, in pixels of the image."""
        return geometry.whole


def find_preparation(name: str) -> Preparation:
    """The preparation of that name.

    Raises:
        BundleError: there is none.
        GapExportError: it is another package's and cannot be used.
    """
    known = known_preparations()
    if name not in known:
        raise BundleError(
            "the image's preparation is not known",
            seen=name,
            allowed=", ".join(known),
            fix="install the package that brings the model's family",
        )
    return load_object(known[name], Preparation, what=f"preparation {name}")  # type: ignore[type-abstract]


def input_frame(geometry: ImageGeometry, spec: ImageSpec) -> Frame:
    """What a view of the whole image, and so its grid of visual tokens, covers."""
    return find_preparation(spec.preparation).frame(geometry)


def tile_layout(
    geometry: ImageGeometry, spec: ImageSpec, grid: GridSpec
) -> TileLayout | TileStack | None:
    """How the tokens of an image's tiles are put in order; None of one that is not cut."""
    return find_preparation(spec.preparation).tile_layout(geometry, spec, grid)


class _Pad(Preparation):
    """Padded to a square, centred, then resized."""

    def views(
        self,
        image: Image.Image,
        spec: ImageSpec,
        canvas: Canvas | None,  # noqa: ARG002
    ) -> Views:
        side = max(image.size)
        square = image if image.size == (side, side) else _center(image, (side, side), spec)
        return [resize(square, spec)]

    def frame(self, geometry: ImageGeometry) -> Frame:
        return geometry.padded_square


class _Squash(Preparation):
    """Resized without regard to the aspect ratio."""

    def views(
        self,
        image: Image.Image,
        spec: ImageSpec,
        canvas: Canvas | None,
    ) -> Views:
        return [resize(image, spec) if canvas is None else _laid_out(image, canvas.size, spec)]

    def canvas(self, size: Size, spec: ImageSpec) -> Canvas | None:
        """Of several the one whose aspect is the nearest; of two that are as near the first."""
        if not spec.grids:
            return None

        def distance(canvas: Size) -> float:
            return abs(math.log(canvas[1] * size[0] / (canvas[0] * size[1])))

        nearest = min(canvas_sizes(spec), key=distance)
        return Canvas(size=nearest, fitted=nearest)


class _AnyRes(Preparation):
    """The squashed image, then tiles of it, fitted to a canvas, row by row (LLaVA-1.6)."""

    def canvas(self, size: Size, spec: ImageSpec) -> Canvas | None:
        assert spec.tiles is not None, "the manifest's values were checked"
        canvas = choose_canvas(size, spec.tiles.resolutions)
        return Canvas(size=canvas, fitted=fitted_size(size, canvas))

    def views(self, image: Image.Image, spec: ImageSpec, canvas: Canvas | None) -> Views:
        assert canvas is not None, "self.canvas gave it"
        height, width = canvas.fitted
        fitted = image.resize((width, height), _RESAMPLE[spec.resample])
        return [resize(image, spec), *_cut(_center(fitted, canvas.size, spec), spec)]

    def tile_layout(
        self, geometry: ImageGeometry, spec: ImageSpec, grid: GridSpec
    ) -> TileLayout | None:
        if geometry.canvas is None:
            return None
        assert spec.tiles is not None, "a canvas is one of the tiles' resolutions"
        tile_rows, tile_cols = _tiling(geometry.canvas, spec)
        return TileLayout.for_image(
            geometry.width,
            geometry.height,
            rows=grid.rows,
            cols=grid.cols,
            tile_rows=tile_rows,
            tile_cols=tile_cols,
            follows=spec.tiles.follows,
        )


class _DynamicTiles(Preparation):
    """Tiles of the image squashed to a canvas, row by row, then a thumbnail (InternVL-1.5).

    An image whose canvas is one tile is that tile alone, and not cut.
    """

    def canvas(self, size: Size, spec: ImageSpec) -> Canvas | None:
        assert spec.tiles is not None, "the manifest's values were checked"
        canvas = nearest_canvas(size, spec.tiles.resolutions)
        return None if _tiling(canvas, spec) == (1, 1) else Canvas(size=canvas, fitted=canvas)

    def views(self, image: Image.Image, spec: ImageSpec, canvas: Canvas | None) -> Views:
        thumbnail = resize(image, spec)
        if canvas is None:
            return [thumbnail]
        height, width = canvas.fitted
        squashed = image.resize((width, height), _RESAMPLE[spec.resample])
        return [*_cut(squashed, spec), thumbnail]

    def tile_layout(
        self, geometry: ImageGeometry, spec: ImageSpec, grid: GridSpec
    ) -> TileStack | None:
        if geometry.canvas is None:
            return None
        tile_rows, tile_cols = _tiling(geometry.canvas, spec)
        return TileStack(rows=grid.rows, cols=grid.cols, tile_rows=tile_rows, tile_cols=tile_cols)


def _laid_out(image: Image.Image, size: Size, spec: ImageSpec) -> Image.Image:
    """An image squashed to a canvas, its tokens' places laid on the first canvas row by row."""
    squashed = image.resize((size[1], size[0]), _RESAMPLE[spec.resample])
    if size == (spec.height, spec.width):
        return squashed
    height, width = token_size(spec)
    places = np.asarray(squashed).reshape(size[0] // height, height, size[1] // width, width, 3)
    laid = places.swapaxes(1, 2).reshape(*spec.grids[0], height, width, 3).swapaxes(1, 2)
    return Image.fromarray(laid.reshape(spec.height, spec.width, 3))


PAD, SQUASH, ANYRES, DYNAMIC_TILES = _Pad(), _Squash(), _AnyRes(), _DynamicTiles()


def resize(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """An image, resized to what the vision encoder reads."""
    return image.resize((spec.width, spec.height), _RESAMPLE[spec.resample])


def _tiling(canvas: Size, spec: ImageSpec) -> tuple[int, int]:
    """Rows and columns of tiles on a canvas."""
    return canvas[0] // spec.height, canvas[1] // spec.width


def _cut(canvas: Image.Image, spec: ImageSpec) -> Views:
    """The tiles of a canvas, row by row."""
    return [
        canvas.crop((left, top, left + spec.width, top + spec.height))
        for top in range(0, canvas.height, spec.height)
        for left in range(0, canvas.width, spec.width)
    ]


def _center(image: Image.Image, size: Size, spec: ImageSpec) -> Image.Image:
    canvas = Image.new("RGB", (size[1], size[0]), spec.pad_color)
    canvas.paste(image, ((size[1] - image.width) // 2, (size[0] - image.height) // 2))
    return canvas
