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
_PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
# Within a scan 0xFF is followed by 0 or a restart marker, and may be repeated before a marker.
_AFTER_SCAN = re.compile(rb"\xff+[^\x00\xff\xd0-\xd7]")


@dataclass(frozen=True, kw_only=True)
class JpegFile:
    r"""What a JPEG file holds besides pixels.

    Attributes:
        exif: EXIF data without its ``Exif\0\0``; empty where there is none.
        xmp: The XMP packet; empty where there is none.
        num_scans: Scans: passes over the image.
        is_progressive: Whether each scan refines the ones before.
        pixels_only: The file without what pixels do not depend on.
    """

    exif: bytes
    xmp: bytes
    num_scans: int
    is_progressive: bool
    pixels_only: bytes


def read_jpeg(data: bytes) -> JpegFile:
    """Walk over the segments, up to the end of the image; what follows it is not read.

    Raises:
        ValueError: a segment is not where it should be, or the file ends before the image does.
    """
    exif = xmp = b""
    num_scans = 0
    is_progressive = False
    kept: list[bytes] = []
    for marker, start, content, end in _segments(data):
        body = data[content:end]
        if marker == _APP1 and body.startswith(_EXIF):
            # A long one goes on in the next segment.
            exif += body[len(_EXIF) :]
        elif marker == _APP1 and body.startswith(_XMP) and not xmp:
            xmp = body[len(_XMP) :]
        num_scans += marker == _SOS
        is_progressive |= marker in _PROGRESSIVE
        names_colors = marker in (_APP0, _APP14)
        if names_colors or (marker not in _APPLICATION and marker != _COMMENT):
            kept.append(data[start:end])
    return JpegFile(
        exif=exif,
        xmp=xmp,
        num_scans=num_scans,
        is_progressive=is_progressive,
        pixels_only=b"".join(kept),
    )


def _segments(data: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Marker, start, start of the content, and end of each segment; a scan's data is part of it."""
    if data[:2] != b"\xff\xd8":
        raise ValueError("no start of a JPEG image")
    yield _SOI, 0, 2, 2
    place = 2
    while True:
        start = place
        while data[place : place + 1] == b"\xff":
            place += 1
        if place == start:
            raise ValueError(f"no JPEG marker at byte {start}")
        if place >= len(data):
            raise ValueError("the JPEG file ends before its image does")
        marker = data[place]
        place += 1
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
