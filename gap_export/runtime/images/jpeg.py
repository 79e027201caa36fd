"""The segments of a JPEG file (ITU-T T.81, annex B)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_SOI, _EOI, _SOS = 0xD8, 0xD9, 0xDA
_APP0, _APP1, _APP14 = 0xE0, 0xE1, 0xEE
_APPLICATION = range(_APP0, 0xF0)
_COMMENT = 0xFE
_EXIF = b"Exif\0\0"
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
# Of all frames; 0xC4, 0xC8 and 0xCC between them are none.
_FRAMES = (0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
_LOSSLESS = (0xC3, 0xC7, 0xCB, 0xCF)
# More of them are longer than the largest file, if they are as long as they can be.
_MAX_SEGMENTS = 10_000
_FILL = re.compile(rb"\xff+")
# Within a scan 0xFF is followed by 0 or a restart marker. It may be repeated before a marker; to
# look for that as well would take time that grows with the square of its number.
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


@dataclass(frozen=True, kw_only=True)
class JpegFile:
    r"""What a JPEG file holds besides pixels.

    Attributes:
        exif: EXIF data without its ``Exif\0\0``; empty where there is none.
        xmp: The XMP packet; empty where there is none.
        num_pixels: Pixels of the frame; 0 without one.
        num_scans: Scans: passes over the image.
        is_progressive: Whether each scan refines the ones before.
        is_lossless: Whether it holds pixels, and no coefficients.
        pixels_only: The file without what pixels do not depend on.
        broken: Why it could not be walked to the end of its image; None where it could.
    """

    exif: bytes
    xmp: bytes
    num_pixels: int
    num_scans: int
    is_progressive: bool
    is_lossless: bool
    pixels_only: bytes
    broken: str | None


def read_jpeg(data: bytes) -> JpegFile:
    """Walk over the segments, up to the end of the image; what follows it is not read."""
    xmp = b""
    broken = None
    num_pixels = num_scans = 0
    is_progressive = is_lossless = False
    exif: list[bytes] = []
    kept: list[bytes] = []
    end = 0
    try:
        for marker, start, content, end in _segments(data):
            body = data[content:end]
            if marker == _APP1 and body.startswith(_EXIF):
                # A long one goes on in the next segment.
                exif.append(body[len(_EXIF) :])
            elif marker == _APP1 and body.startswith(_XMP) and not xmp:
                xmp = body[len(_XMP) :]
            elif marker in _FRAMES:
                height, width = body[1:3], body[3:5]
                num_pixels += int.from_bytes(height, "big") * int.from_bytes(width, "big")
            num_scans += marker == _SOS
            is_progressive |= marker in _PROGRESSIVE
            is_lossless |= marker in _LOSSLESS
            names_colors = marker in (_APP0, _APP14)
            if names_colors or (marker not in _APPLICATION and marker != _COMMENT):
                kept.append(data[start:end])
    except _TooManyError as err:
        broken = str(err)
    except ValueError as err:
        # A decoder would look for more: of what is there at most so many markers begin a scan.
        broken = str(err)
        is_progressive |= num_scans == 0
        num_scans += data.count(b"\xff\xda", end)
        kept.append(data[end:])
    return JpegFile(
        exif=b"".join(exif),
        xmp=xmp,
        num_pixels=num_pixels,
        num_scans=num_scans,
        is_progressive=is_progressive,
        is_lossless=is_lossless,
        pixels_only=b"".join(kept),
        broken=broken,
    )


class _TooManyError(ValueError):
    """No file that anybody wrote for its image."""


def _segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Marker, start, start of the content, and end of each segment; a scan's data is part of it."""
    if data[:2] != b"\xff\xd8":
        raise ValueError("no start of a JPEG image")
    yield _SOI, 0, 2, 2
    place = 2
    for _ in range(_MAX_SEGMENTS):
        fill = _FILL.match(data, place)
        if fill is None:
            raise ValueError(f"no JPEG marker at byte {place}")
        start, place = fill.end() - 1, fill.end() + 1
        if place > len(data):
            raise ValueError("the JPEG file ends before its image does")
        marker = data[place - 1]
        if marker == _EOI:
            yield marker, start, place, place
            return
        length = int.from_bytes(data[place : place + 2], "big")
        end = place + length
        if length < 2 or end > len(data):
            raise ValueError(f"a JPEG segment at byte {start} that does not fit the file")
        content = place + 2
        if marker == _SOS:
            following = _AFTER_SCAN.search(data, end)
            if following is None:
                raise ValueError("the JPEG file ends before its image does")
            end = following.start()
        yield marker, start, content, end
        place = end
    raise _TooManyError(f"more than {_MAX_SEGMENTS} JPEG segments")
