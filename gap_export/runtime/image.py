"""From whatever picture a user has to what the vision encoder reads."""

from __future__ import annotations

import io
import math
import os
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from gap_export.errors import ImageError
from gap_export.manifest import ImageSpec
from gap_export.runtime.geometry import ImageGeometry, Size, choose_canvas, fitted_size

ImageInput = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]

MAX_PIXELS = 64_000_000
# Named, since Pillow would start other programs for some formats, such as EPS.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_ALLOWED = f"a picture of at most {MAX_PIXELS // 1_000_000} megapixels ({', '.join(_FORMATS)})"
# What Pillow's readers raise on damaged files.
_DAMAGED = (OSError, SyntaxError, ValueError, EOFError, IndexError, TypeError, struct.error)
_MAX_16_BIT = 65_535
# A thin picture padded to a square could be huge, and so could what Pillow keeps between the two
# passes of a resize. Above this side a picture is shrunk first: a square then is no larger than the
# largest picture.
_MAX_SIDE = math.isqrt(MAX_PIXELS)
_RESAMPLE = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
}


def load_image(image: ImageInput, *, pad_color: tuple[int, int, int]) -> Image.Image:
    """A picture as displayed: upright, RGB, opaque.

    EXIF rotation is applied; grey, palette, CMYK and 16-bit pictures are converted, also where 32
    bits hold 16-bit values; transparent parts show ``pad_color``; of an animation the first (or
    current) frame is taken.

    Args:
        image: A file, a Pillow picture, or uint8 [H, W], [H, W, 3] (RGB) or [H, W, 4] (RGBA).
        pad_color: RGB 0..255.

    Raises:
        ImageError: missing, not a picture, damaged, empty, too large, or with pixels whose range
            nobody can know (floating point, 32-bit integers beyond 16 bits).
    """
    if isinstance(image, np.ndarray):
        return _to_rgb(_from_array(image), pad_color=pad_color, name="the array")
    if isinstance(image, Image.Image):
        return _to_rgb(image, pad_color=pad_color, name="the picture")
    if not isinstance(image, (str, os.PathLike)):
        raise ImageError(
            "not a picture",
            seen=type(image).__name__,
            allowed="a path, a PIL.Image.Image, or a uint8 array [H, W, 3]",
        )
    path = Path(image)
    _check_file(path)
    opened = _open(path, name=str(path))
    with opened:
        return _to_rgb(opened, pad_color=pad_color, name=str(path))


def open_encoded(encoded: bytes, *, name: str) -> Image.Image:
    """A picture out of the bytes of its file, not decoded yet; :func:`load_image` does that.

    Args:
        encoded: What a file of one of the formats allowed holds.
        name: What errors call it.

    Raises:
        ImageError: not a picture, too large, or damaged at its beginning.
    """
    return _open(io.BytesIO(encoded), name=name)


def prepare_image(image: Image.Image, spec: ImageSpec) -> tuple[NDArray[np.float32], ImageGeometry]:
    """Pad, squash or cut into tiles; resize and normalise.

    Args:
        image: RGB, from :func:`load_image`.
        spec: What the vision encoder reads.

    Returns:
        pixel_values float32 [I, 3, height, width] and the picture's geometry. I is 1, but for
        ``anyres``: the squashed picture, then its tiles row by row.
    """
    picture = (image.height, image.width)
    image = _shrink_thin(image)
    canvas: Size | None = None
    if spec.preparation == "pad":
        inputs = [_resize(_pad_to_square(image, spec.pad_color), spec)]
    else:
        inputs = [_resize(image, spec)]
    if spec.preparation == "anyres":
        assert spec.tiles is not None, "the manifest's values were checked"
        canvas = choose_canvas(picture, spec.tiles.resolutions)
        inputs += _cut_tiles(image, canvas, fitted_size(picture, canvas), spec)
    pixels: NDArray[np.float32] = np.stack([np.asarray(each, dtype=np.float32) for each in inputs])
    unit = pixels / np.float32(255.0)
    normal = (unit - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    pixel_values: NDArray[np.float32] = np.ascontiguousarray(normal.transpose(0, 3, 1, 2))
    return pixel_values, ImageGeometry(width=picture[1], height=picture[0], canvas=canvas)


def _open(file: Path | io.BytesIO, *, name: str) -> ImageFile.ImageFile:
    try:
        with _quiet():
            return Image.open(file, formats=_FORMATS)
    except Image.DecompressionBombError as err:
        raise ImageError("the picture is too large", seen=name, allowed=_ALLOWED) from err
    except UnidentifiedImageError as err:
        raise ImageError("not a picture that can be read", seen=name, allowed=_ALLOWED) from err
    except _DAMAGED as err:
        raise ImageError("the picture is damaged", seen=f"{name}: {err}", allowed=_ALLOWED) from err


@contextmanager
def _quiet() -> Iterator[None]:
    """Pillow warns of large sizes, which we refuse ourselves, and of metadata we do not read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check_file(path: Path) -> None:
    try:
        if path.is_file():
            if path.stat().st_size == 0:
                raise ImageError("the picture is an empty file", seen=path, allowed=_ALLOWED)
            return
        what = "this is a folder, not a picture" if path.is_dir() else "no such picture"
        if path.exists() and not path.is_dir():
            what = "not a plain file"
    except (OSError, ValueError) as err:
        raise ImageError("the picture cannot be read", seen=f"{path!r}: {err}") from err
    raise ImageError(what, seen=path, allowed=_ALLOWED, fix="check the path")


def _from_array(array: NDArray[Any]) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shaped or 0 in array.shape:
        raise ImageError(
            "an array that is not a picture",
            seen=f"{array.dtype} {list(array.shape)}",
            allowed="uint8 [H, W], [H, W, 3] or [H, W, 4], not empty",
        )
    return Image.fromarray(array)


def _to_rgb(image: Image.Image, *, pad_color: tuple[int, int, int], name: str) -> Image.Image:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError("the picture has no pixels", seen=f"{name}: {width}x{height}")
    if width * height > MAX_PIXELS:
        raise ImageError(
            "the picture is too large",
            seen=f"{name}: {width}x{height} pixels",
            allowed=_ALLOWED,
            fix="make it smaller first",
        )
    try:
        with _quiet():
            image.load()
            return _flatten(ImageOps.exif_transpose(image), pad_color, name)
    except (*_DAMAGED, Image.DecompressionBombError, MemoryError) as err:
        raise ImageError(
            "the picture is damaged or not complete",
            seen=f"{name}: {err}",
            allowed=_ALLOWED,
            fix="save it again, or get it again",
        ) from err


def _flatten(image: Image.Image, pad_color: tuple[int, int, int], name: str) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits a pixel, whatever the byte order; Pillow's own conversion would clip them. Pillow
        # holds some 16-bit files in 32 bits ("I"); real 32-bit values have no agreed white.
        wide = np.asarray(image).astype(np.int64)
        if wide.min() < 0 or wide.max() > _MAX_16_BIT:
            raise _unknown_range(f"{name}: 32-bit integers, {wide.min()} to {wide.max()}")
        return Image.fromarray((wide // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise _unknown_range(f"{name}: floating-point pixels")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        canvas = Image.new("RGBA", layer.size, (*pad_color, 255))
        canvas.alpha_composite(layer)
        return canvas.convert("RGB")
    return image.convert("RGB")


def _unknown_range(seen: str) -> ImageError:
    return ImageError(
        "the picture's pixel format has no agreed range of brightness",
        seen=seen,
        allowed="8 or 16 bits a channel",
        fix="save it with 8 bits a channel",
    )


def _shrink_thin(image: Image.Image) -> Image.Image:
    side = max(image.size)
    if side <= _MAX_SIDE:
        return image
    scale = _MAX_SIDE / side
    small = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(small, Image.Resampling.BOX)


def _pad_to_square(image: Image.Image, color: tuple[int, int, int]) -> Image.Image:
    side = max(image.size)
    return image if image.size == (side, side) else _center(image, (side, side), color)


def _cut_tiles(
    image: Image.Image, canvas: Size, fitted: Size, spec: ImageSpec
) -> list[Image.Image]:
    """Tiles row by row of the picture, resized to ``fitted``, in the middle of its canvas."""
    resized = image.resize((fitted[1], fitted[0]), _RESAMPLE[spec.resample])
    whole = _center(resized, canvas, spec.pad_color)
    return [
        whole.crop((left, top, left + spec.width, top + spec.height))
        for top in range(0, canvas[0], spec.height)
        for left in range(0, canvas[1], spec.width)
    ]


def _center(image: Image.Image, size: Size, color: tuple[int, int, int]) -> Image.Image:
    canvas = Image.new("RGB", (size[1], size[0]), color)
    canvas.paste(image, ((size[1] - image.width) // 2, (size[0] - image.height) // 2))
    return canvas


def _resize(image: Image.Image, spec: ImageSpec) -> Image.Image:
    return image.resize((spec.width, spec.height), _RESAMPLE[spec.resample])
