"""From any image a user has to what the vision encoder reads."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile

from gap_export.errors import ImageError, UsageError
from gap_export.runtime.images.damage import NotCheckedError
from gap_export.runtime.images.files import (
    DAMAGED,
    MAX_MEMORY,
    MAX_PIXELS,
    EncodedImage,
    OpenedImage,
    check_size,
    damaged,
    open_encoded,
    read_file,
    too_large,
)
from gap_export.runtime.images.geometry import ImageGeometry
from gap_export.runtime.images.preparations import find_preparation
from gap_export.runtime.images.tiff import ORIENTATION
from gap_export.spec.manifest import ImageSpec

ImageInput = str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | EncodedImage
# As displayed, or as stored: EXIF may say that a stored image is to be turned.
ImageFrame = Literal["upright", "raw"]
ColorOrder = Literal["rgb", "bgr"]

_MAX_16_BIT = 65_535
# A thin image padded to a square could be huge, and so could what Pillow keeps between the two
# passes of a resize. Above this side an image is shrunk first: a square then is no larger than the
# largest image.
_MAX_SIDE = math.isqrt(MAX_PIXELS)
# Pixels that are converted at once: what a conversion takes beside its result is next to nothing.
_PIECE = 1 << 20
# EXIF 2.32, table 6: what turns a stored image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Those that exchange width and height.
TURNED_ON_ITS_SIDE = (5, 6, 7, 8)


@dataclass(frozen=True, kw_only=True)
class LoadedImage:
    """An image, decoded.

    Attributes:
        image: RGB, opaque.
        orientation: The EXIF orientation it carries, 1..8; 1 where it carries none.
        warnings: What the user should know.
    """

    image: Image.Image
    orientation: int = 1
    warnings: tuple[str, ...] = ()


def load_image(
    image: ImageInput,
    *,
    pad_color: tuple[int, int, int],
    frame: ImageFrame = "upright",
    allow_damaged: bool = False,
    color: ColorOrder = "rgb",
) -> Image.Image:
    """An image as displayed: upright, RGB, opaque; see :func:`read_image`."""
    return read_image(
        image, pad_color=pad_color, frame=frame, allow_damaged=allow_damaged, color=color
    ).image


def read_image(
    image: ImageInput,
    *,
    pad_color: tuple[int, int, int],
    frame: ImageFrame = "upright",
    allow_damaged: bool = False,
    color: ColorOrder = "rgb",
) -> LoadedImage:
    """Decode an image and bring it to RGB without transparency.

    Gray, palette, CMYK and 16-bit images are converted, also where 32 bits hold 16-bit values;
    transparent parts show ``pad_color``; of an animation the first (or current) frame is taken.

    A file is damaged where its decoder would have to recover from something. What cannot be seen: a
    changed byte that leaves a valid file, which only PNG rules out by checksums (and deflated TIFF
    for its pixels). Uncommon forms of JPEG and TIFF cannot be checked; a warning says so. Of an
    image that Pillow has decoded already nothing can be said.

    Args:
        image: A file, the bytes of one, a Pillow image, or uint8 [H, W], [H, W, 3] or [H, W, 4].
        pad_color: RGB 0..255.
        frame: ``upright``: turned as EXIF says, as displayed; ``raw``: as stored.
        allow_damaged: Use what can be decoded of a damaged image, with a warning.
        color: Order of an array's channels: ``rgb`` (then alpha), or ``bgr``, as OpenCV has it.

    Raises:
        ImageError: missing, not an image, damaged, empty, too large, or with pixels whose range
            is not known (floating point, 32-bit integers beyond 16 bits).
        UsageError: another value of ``frame`` or ``color``, or ``bgr`` without channels.
    """
    _check_choice("frame", frame, get_args(ImageFrame))
    _check_choice("color", color, get_args(ColorOrder))
    if color == "bgr" and not (isinstance(image, np.ndarray) and image.ndim == 3):
        shape = list(getattr(image, "shape", ()))
        kind = f"an array {shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise UsageError(
            "color is the order of an array's channels",
            seen=f"bgr for {kind}",
            allowed="bgr for uint8 [H, W, 3] or [H, W, 4] alone",
        )
    if isinstance(image, np.ndarray):
        opened, name = None, "the array"
        image = _from_array(image, color)
    elif isinstance(image, Image.Image):
        opened, name = _reopen(image), "the image"
    elif isinstance(image, EncodedImage):
        opened, name = open_encoded(image), image.name
    elif isinstance(image, (str, os.PathLike)):
        opened, name = open_encoded(read_file(Path(image))), str(image)
    else:
        raise ImageError(
            "not an image",
            seen=type(image).__name__,
            allowed="a path, a PIL.Image.Image, or a uint8 array [H, W, 3]",
        )
    if opened is None:
        assert isinstance(image, Image.Image), "all others are opened above"
        check_size(image, name=name)
        opened = OpenedImage(image=image, orientation=_orientation_of(image))
    return _decode(opened, pad_color, frame=frame, allow_damaged=allow_damaged, name=name)


def prepare_image(image: Image.Image, spec: ImageSpec) -> tuple[NDArray[np.float32], ImageGeometry]:
    """Prepare an image in its model's way, and normalize.

    Args:
        image: RGB, from :func:`load_image`.
        spec: What the vision encoder reads.

    Returns:
        pixel_values float32 [I, 3, height, width] and the image's geometry. I is 1 where the image
        is not cut. With ``anyres`` the squashed image comes before its tiles, with
        ``dynamic_tiles`` behind them; the tiles themselves come row by row.
    """
    preparation = find_preparation(spec.preparation)
    canvas = preparation.canvas((image.height, image.width), spec)
    geometry = ImageGeometry(
        width=image.width, height=image.height, canvas=None if canvas is None else canvas.size
    )
    side = max(image.size)
    if side > _MAX_SIDE:
        scale = _MAX_SIDE / side
        small = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(small, Image.Resampling.BOX)
    views = preparation.views(image, spec, canvas)
    pixels: NDArray[np.float32] = np.stack([np.asarray(each, dtype=np.float32) for each in views])
    unit = pixels / np.float32(255.0)
    normal = (unit - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    pixel_values: NDArray[np.float32] = np.ascontiguousarray(normal.transpose(0, 3, 1, 2))
    return pixel_values, geometry


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"no such {name}", seen=repr(value), allowed=", ".join(allowed))


def _from_array(array: NDArray[Any], color: ColorOrder) -> Image.Image:
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shaped or 0 in array.shape:
        raise ImageError(
            "an array that is not an image",
            seen=f"{array.dtype} {list(array.shape)}",
            allowed="uint8 [H, W], [H, W, 3] or [H, W, 4], not empty",
        )
    if color == "bgr":
        array = array[..., [2, 1, 0, 3][: array.shape[2]]]
    return Image.fromarray(array)


def _reopen(image: Image.Image) -> OpenedImage | None:
    """An image that Pillow has opened and not decoded, from its file; None for all others."""
    file = getattr(image, "fp", None)
    if not isinstance(image, ImageFile.ImageFile) or not image.tile or file is None:
        return None
    if image.tell():
        # Of an animation the current frame is taken.
        return None
    try:
        place = file.tell()
        file.seek(0)
        data = file.read(MAX_MEMORY + 1)
        file.seek(place)
    except (OSError, ValueError) as err:
        raise damaged("the image", err) from err
    if len(data) > MAX_MEMORY:
        raise too_large(f"the image's file: more than {MAX_MEMORY:,} bytes")
    opened = open_encoded(EncodedImage(data=data, name="the image"))
    # It may have been asked for at a smaller size.
    return opened if sorted(opened.image.size) == sorted(image.size) else None


def _orientation_of(image: Image.Image) -> int:
    """The orientation that a Pillow image carries; 1 where it carries none."""
    try:
        found = image.getexif().get(ORIENTATION, 1)
    except DAMAGED:
        return 1
    return found if found in _TURNS else 1


def _decode(
    opened: OpenedImage,
    pad_color: tuple[int, int, int],
    *,
    frame: ImageFrame,
    allow_damaged: bool,
    name: str,
) -> LoadedImage:
    damage = unchecked = None
    try:
        damage = opened.find_damage()
    except NotCheckedError as err:
        unchecked = str(err)
    image = opened.image
    if damage is None or allow_damaged:
        try:
            image.load()
        except DAMAGED as err:
            damage = damage or str(err)
            if isinstance(image, ImageFile.ImageFile):
                # It keeps what was decoded; without tiles there is nothing left to do.
                image.tile = []
    if damage is not None and not allow_damaged:
        raise damaged(
            name,
            damage,
            fix="get it again; --allow-damaged (allow_damaged=True) uses what can be decoded",
        )
    try:
        rgb = _flatten(image, pad_color, name)
    except DAMAGED as err:
        raise damaged(name, err) from err
    if frame == "upright" and opened.orientation in _TURNS:
        rgb = rgb.transpose(_TURNS[opened.orientation])
    odd = []
    if unchecked is not None:
        odd.append(f"the image could not be checked for damage: {unchecked}")
    if damage is not None:
        odd.append(f"the image is damaged, and was used all the same: {damage}")
    return LoadedImage(image=rgb, orientation=opened.orientation, warnings=(*opened.warnings, *odd))


def _flatten(image: Image.Image, pad_color: tuple[int, int, int], name: str) -> Image.Image:
    if image.mode == "F":
        raise _unknown_range(f"{name}: floating-point pixels")
    if image.mode == "I":
        # Pillow holds some 16-bit files in 32 bits; real 32-bit values have no agreed white.
        low, high = (int(value) for value in np.ravel(image.getextrema()))
        if low < 0 or high > _MAX_16_BIT:
            raise _unknown_range(f"{name}: 32-bit integers, {low} to {high}")
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    flat = Image.new("RGB", image.size)
    rows = max(1, _PIECE // image.width)
    for top in range(0, image.height, rows):
        piece = image.crop((0, top, image.width, min(top + rows, image.height)))
        if piece.mode.startswith("I"):
            # 16 bits a pixel, in either byte order; Pillow's own conversion would clip them.
            piece = Image.fromarray((np.asarray(piece).astype(np.int64) // 257).astype(np.uint8))
        elif piece.has_transparency_data:
            layer = piece.convert("RGBA")
            piece = Image.new("RGBA", layer.size, (*pad_color, 255))
            piece.alpha_composite(layer)
        flat.paste(piece.convert("RGB"), (0, top))
    return flat


def _unknown_range(seen: str) -> ImageError:
    return ImageError(
        "the image's pixel format has no agreed range of brightness",
        seen=seen,
        allowed="8 or 16 bits a channel",
        fix="save it with 8 bits a channel",
    )
