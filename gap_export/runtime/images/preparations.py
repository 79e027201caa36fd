"""How an image becomes what the vision encoder reads, and which part of the image that shows.

A family of another package brings a way of its own as a :class:`Preparation`, which it names in
:attr:`gap_export.spec.family.Family.preparations`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

from PIL import Image

from gap_export.errors import BundleError
from gap_export.plugins import load_object
from gap_export.runtime.images.geometry import (
    Frame,
    ImageGeometry,
    Size,
    choose_canvas,
    fitted_size,
)
from gap_export.spec.manifest import ImageSpec
from gap_export.spec.preparations import known_preparations

Views = list[Image.Image]
_RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class Canvas(NamedTuple):
    """What an image is fitted to, both sizes (height, width) in pixels.

    Attributes:
        size: The canvas; its tiles are as large as the vision encoder's inputs.
        fitted: What the image becomes on it, its aspect kept.
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

    def frame(self, geometry: ImageGeometry) -> Frame:
        """What the first view covers, in pixels of the image."""
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
        canvas: Canvas | None,  # noqa: ARG002
    ) -> Views:
        return [resize(image, spec)]


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
        whole = _center(fitted, canvas.size, spec)
        tiles = [
            whole.crop((left, top, left + spec.width, top + spec.height))
            for top in range(0, canvas.size[0], spec.height)
            for left in range(0, canvas.size[1], spec.width)
        ]
        return [resize(image, spec), *tiles]


PAD, SQUASH, ANYRES = _Pad(), _Squash(), _AnyRes()


def resize(image: Image.Image, spec: ImageSpec) -> Image.Image:
    """An image, resized to what the vision encoder reads."""
    return image.resize((spec.width, spec.height), _RESAMPLE[spec.resample])


def _center(image: Image.Image, size: Size, spec: ImageSpec) -> Image.Image:
    canvas = Image.new("RGB", (size[1], size[0]), spec.pad_color)
    canvas.paste(image, ((size[1] - image.width) // 2, (size[0] - image.height) // 2))
    return canvas
