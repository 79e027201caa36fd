"""Image files, opened with nothing taken on trust: limits first, then damage, then the pixels.

Time is limited by scans and pixels, not by a clock: what serves many users has to stop a decoder
that takes too long from outside of its process.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from gap_export.errors import ImageError, ImageFormatError, ImageSizeError
from gap_export.runtime.images.damage import gif_damage, jpeg_damage, png_damage, tiff_damage
from gap_export.runtime.images.jpeg import JpegFile, read_jpeg
from gap_export.runtime.images.tiff import ORIENTATION, SIGNATURES, Directory, read_directory

MAX_PIXELS = 64_000_000
# What an image may take while it is decoded, its file included. It is below what a Jetson Orin Nano
# has left beside a model.
MAX_MEMORY = 512 << 20
# Encoders write ten scans, or some more; each one costs a pass over all of the image.
MAX_SCANS = 64
MAX_SCANNED_PIXELS = 16 * MAX_PIXELS
# LZW is followed in Python to see damage, about a second for each megapixel of noise.
_MAX_GIF_PIXELS = 1 << 22
# Pillow's own classes: `Image.open` warns of sizes that are refused here anyway, and a warning that
# is switched off is off for all threads.
_OPENERS: Mapping[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
}
_SIGNATURES = {
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "JPEG": (b"\xff\xd8\xff",),
    "GIF": (b"GIF87a", b"GIF89a"),
    "BMP": (b"BM",),
    "TIFF": SIGNATURES,
    "PPM": (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"),
}
ALLOWED = (
    f"an image of at most {MAX_PIXELS // 1_000_000} megapixels and {MAX_MEMORY >> 20} MiB in "
    f"memory ({', '.join(_OPENERS)})"
)
# What Pillow's readers raise on damaged files. A warning is raised where users turn them to errors.
DAMAGED = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    struct.error, Warning, Image.DecompressionBombError, MemoryError,
)  # fmt: skip
# Bytes that Pillow holds a pixel in; four for all others.
_BYTES_OF_MODE = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}
# What decoders hold beside it: libwebp a frame and two canvases.
_BYTES_TO_DECODE = {"WEBP": 12}
# A coefficient has two bytes; of three planes, none of them smaller.
_BYTES_OF_COEFFICIENTS = 6
_XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)([1-8])")


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """The bytes of an image file.

    Attributes:
        data: What a file of one of the formats allowed holds.
        name: What errors call it.
    """

    data: bytes
    name: str


@dataclass(frozen=True, kw_only=True)
class OpenedImage:
    """An image within the limits, not decoded yet.

    Attributes:
        image: Pillow's.
        orientation: 1..8 as EXIF counts them; 1 where it carries none.
        warnings: What the user should know.
        find_damage: Says what a decoder would pass over; None where nothing is known of that.
            Raises NotCheckedError where it cannot be said.
    """

    image: Image.Image
    orientation: int
    warnings: tuple[str, ...] = ()
    find_damage: Callable[[], str | None] = field(default=lambda: None)


def read_file(path: Path) -> EncodedImage:
    """All of an image file.

    Raises:
        ImageError: missing, empty, a folder, something else, or larger than an image may be.
    """
    try:
        if path.is_file():
            size = path.stat().st_size
            if size == 0:
                raise ImageError("the image is an empty file", seen=path, allowed=ALLOWED)
            if size > MAX_MEMORY:
                raise too_large(f"{path}: {size:,} bytes")
            return EncodedImage(data=path.read_bytes(), name=str(path))
        what = "this is a folder, not an image" if path.is_dir() else "no such image"
        if path.exists() and not path.is_dir():
            what = "not a plain file"
    except (OSError, ValueError) as err:
        raise ImageError("the image cannot be read", seen=f"{str(path)!r}: {err}") from err
    raise ImageError(what, seen=path, allowed=ALLOWED, fix="check the path")


def open_encoded(encoded: EncodedImage) -> OpenedImage:
    """Open an image; nothing of it is decoded yet.

    Raises:
        ImageError: not an image, too large, or damaged at its beginning.
    """
    data, name = encoded.data, encoded.name
    kinds = (kind for kind, signatures in _SIGNATURES.items() if data.startswith(signatures))
    kind = "WEBP" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else next(kinds, None)
    if kind is None:
        raise ImageFormatError("not an image that can be read", seen=name, allowed=ALLOWED)
    jpeg = read_jpeg(data) if kind == "JPEG" else None
    try:
        directory = read_directory(data) if kind == "TIFF" else None
        if directory is not None:
            directory.check()
    except ValueError as err:
        raise damaged(name, err) from err
    # Of a JPEG file Pillow sees what pixels depend on: nothing else of it can do harm.
    decoded = data if jpeg is None else jpeg.pixels_only
    if directory is not None:
        # Pillow would turn it, and say no more that it did.
        decoded = directory.with_integer(ORIENTATION, 1)
    try:
        image = _OPENERS[kind](io.BytesIO(decoded))
    except DAMAGED as err:
        raise damaged(name, err if jpeg is None else jpeg.broken or err) from err
    check_size(image, name=name, num_bytes=len(data), jpeg=jpeg)
    orientation, warnings = _orientation(image, jpeg, directory)
    return OpenedImage(
        image=image,
        orientation=orientation,
        warnings=warnings,
        find_damage=partial(_find_damage, kind, decoded, image, jpeg, directory),
    )


def check_size(
    image: Image.Image, *, name: str, num_bytes: int = 0, jpeg: JpegFile | None = None
) -> None:
    """Refuse an image by what it would take, before it is decoded.

    Raises:
        ImageError: no pixels, too many, or too much memory or time to decode them.
    """
    width, height = image.size
    pixels = width * height
    if width < 1 or height < 1:
        raise ImageError("the image has no pixels", seen=f"{name}: {width}x{height}")
    if pixels > MAX_PIXELS or (image.format == "GIF" and pixels > _MAX_GIF_PIXELS):
        limit = _MAX_GIF_PIXELS if image.format == "GIF" else MAX_PIXELS
        raise too_large(f"{name}: {width}x{height} pixels; at most {limit:,} are allowed")
    each = _BYTES_OF_MODE.get(image.mode, 4) + _BYTES_TO_DECODE.get(image.format or "", 0)
    if image.mode != "RGB":
        # What it is converted to.
        each += 4
    if jpeg is not None:
        # Where one scan is not all of the image, they are all held until the last one.
        each += _BYTES_OF_COEFFICIENTS * (jpeg.is_progressive or jpeg.num_scans > 1)
        if jpeg.num_scans > MAX_SCANS or jpeg.num_scans * pixels > MAX_SCANNED_PIXELS:
            raise ImageSizeError(
                "the JPEG image has too many scans",
                seen=f"{name}: {jpeg.num_scans} of {width}x{height} pixels",
                allowed=f"at most {MAX_SCANS}, and {MAX_SCANNED_PIXELS // pixels} at this size",
                fix="save it again",
            )
    memory = num_bytes + pixels * each
    if memory > MAX_MEMORY:
        raise too_large(
            f"{name}: {width}x{height} pixels ({image.format or image.mode}, {image.mode}) would "
            f"take {memory >> 20} MiB"
        )


def too_large(seen: str) -> ImageSizeError:
    """The error of an image beyond the limits."""
    return ImageSizeError(
        "the image is too large", seen=seen, allowed=ALLOWED, fix="make it smaller first"
    )


def damaged(
    name: str, reason: object, *, fix: str = "save it again, or get it again"
) -> ImageError:
    """The error of an image that cannot be used."""
    return ImageError(
        "the image is damaged or not complete", seen=f"{name}: {reason}", allowed=ALLOWED, fix=fix
    )


def _find_damage(
    kind: str,
    data: bytes,
    image: ImageFile.ImageFile,
    jpeg: JpegFile | None,
    directory: Directory | None,
) -> str | None:
    if jpeg is not None:
        return jpeg_damage(jpeg)
    if kind == "PNG":
        return png_damage(data)
    if kind == "GIF":
        # A first frame may be smaller than the animation.
        left, top, right, bottom = (image.tile[0][1] if image.tile else None) or (0, 0, 0, 0)
        return gif_damage(data, (right - left) * (bottom - top))
    if directory is not None:
        try:
            return tiff_damage(directory, image.width * image.height)
        except ValueError as err:
            return str(err)
    return None


def _orientation(
    image: ImageFile.ImageFile, jpeg: JpegFile | None, directory: Directory | None
) -> tuple[int, tuple[str, ...]]:
    """The orientation by EXIF, or by XMP where EXIF has none; and what is wrong with EXIF."""
    exif = image.info.get("exif", b"") if jpeg is None else jpeg.exif
    raw = image.info.get("Raw profile type exif")
    try:
        if not exif and isinstance(raw, str):
            # ImageMagick's text: a name, a length, then digits.
            exif = bytes.fromhex("".join(raw.split("\n")[3:]))
        if exif and directory is None:
            directory = read_directory(exif.removeprefix(b"Exif\0\0"))
        found = () if directory is None else directory.integers(ORIENTATION)
    except ValueError as err:
        return 1, (f"the image's EXIF data is damaged ({err}); it is taken to be upright",)
    if found:
        return (found[0], ()) if 1 <= found[0] <= 8 else (1, ())
    xmp = image.info.get("XML:com.adobe.xmp") or image.info.get("xmp") if jpeg is None else jpeg.xmp
    match = _XMP_ORIENTATION.search(xmp.encode() if isinstance(xmp, str) else xmp or b"")
    return (1 if match is None else int(match[1])), ()
