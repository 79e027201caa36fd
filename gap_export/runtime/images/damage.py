"""Damage that an image library passes over: what a decoder recovers from is not the image that was.

Pillow reports files that end early and data that cannot be decoded at all. Each check here finds
what it decodes without a word. What no check can find is in docs/ground.md, "Damaged images": most
formats have no checksum, and a changed byte of theirs is another valid image.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import simplejpeg

from gap_export.runtime.images.jpeg import JpegFile, read_jpeg
from gap_export.runtime.images.tiff import Directory

# libjpeg's words for a file that uses what simplejpeg cannot decode.
_UNKNOWN_TO_JUDGE = ("Unsupported", "Could not determine", "not implemented", "Unknown")
# A strip of several scans is held as coefficients, six bytes a pixel; libtiff takes 100 MB of them.
_MAX_HELD_PIXELS = 1 << 24
# All scans of all strips, times the pixels of the image; a tile may be much larger than that.
_MAX_PASSES, _LEAST_PIXELS = 16, 1 << 20
# TIFF 6.0, sections 3, 11, 14 and 22; Adobe's notes of 1995 and 2002.
_COMPRESSION, _OFFSETS, _COUNTS, _JPEG_TABLES = 259, (273, 324), (279, 325), 347
_DEFLATE = (8, 32946)
_JPEG = 7
# None, LZW and PackBits: libtiff decodes them to exactly the pixels there are, or fails.
_PLAIN = (1, 5, 32773)
_MAX_CODE_BITS = 12
_TABLE_SIZE = 1 << _MAX_CODE_BITS


class NotCheckedError(Exception):
    """Whether an image is damaged cannot be said: nothing here decodes its form strictly."""


def jpeg_damage(jpeg: JpegFile) -> str | None:
    """What libjpeg recovers from in a JPEG file; None where it is in order.

    At an eighth of its size all of the file is decoded, and hardly any memory is taken.

    Raises:
        NotCheckedError: it has a form that cannot be checked.
    """
    if jpeg.broken is not None:
        return jpeg.broken
    if jpeg.is_lossless:
        # It has no eighth: libjpeg would write all of it to where simplejpeg has room for that.
        raise NotCheckedError("lossless JPEG")
    try:
        simplejpeg.decode_jpeg(jpeg.pixels_only, "RGB", min_height=1, min_width=1)
    except ValueError as err:
        if any(words in str(err) for words in _UNKNOWN_TO_JUDGE):
            raise NotCheckedError(f"JPEG, {err}") from err
        return str(err)
    return None


def tiff_damage(directory: Directory, num_pixels: int) -> str | None:
    """What libtiff recovers from in the first image of a TIFF file; None where it is in order.

    Raises:
        NotCheckedError: its compression cannot be checked.
    """
    (compression,) = directory.integers(_COMPRESSION)[:1] or (1,)
    if compression in _PLAIN:
        return None
    if compression in _DEFLATE:
        return next(filter(None, map(_deflate_damage, _strips(directory))), None)
    if compression == _JPEG:
        return _jpeg_strips_damage(directory, num_pixels)
    raise NotCheckedError(f"TIFF compression {compression}")


def gif_damage(data: bytes, num_pixels: int) -> str | None:
    """What a GIF decoder recovers from in the first frame; None where it is in order.

    Pillow stops at the last pixel; a code that was changed mostly stands for another number of
    pixels, so that codes are left over.
    """
    try:
        code_bits, blocks = _first_frame(data)
    except IndexError:
        return "the GIF file ends before its image does"
    if not 1 <= code_bits < _MAX_CODE_BITS:
        return f"GIF codes of {code_bits} bits"
    found = _count_pixels(blocks, code_bits, num_pixels)
    if found != num_pixels:
        more = "more" if found > num_pixels else "fewer"
        return f"GIF data for {more} pixels than the {num_pixels} of the image"
    return None


def png_damage(data: bytes) -> str | None:
    """What Pillow passes over in a PNG file, whose chunks' checksums it does not all read."""
    place = 8
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        end = place + 8 + size
        kind = data[place + 4 : place + 8]
        if zlib.crc32(data[place + 4 : end]).to_bytes(4, "big") != data[end : end + 4]:
            return f"a PNG chunk at byte {place} whose checksum is wrong"
        if kind == b"IEND":
            return None
        place = end + 4
    return "the PNG file ends before its image does"


def _strips(directory: Directory) -> Iterator[bytes]:
    for offsets, counts in zip(_OFFSETS, _COUNTS, strict=True):
        places = zip(directory.integers(offsets), directory.integers(counts), strict=False)
        for place, size in places:
            yield directory.data[place : place + size]


def _jpeg_strips_damage(directory: Directory, num_pixels: int) -> str | None:
    """Each strip is a JPEG file, and says itself how large it is and how many scans it has."""
    tables = directory.content(_JPEG_TABLES)
    left = _MAX_PASSES * max(num_pixels, _LEAST_PIXELS)
    for strip in _strips(directory):
        # The tables that strips share come before a strip's own.
        jpeg = read_jpeg(tables[:-2] + strip[2:] if tables else strip)
        left -= jpeg.num_scans * jpeg.num_pixels
        held = jpeg.num_pixels if jpeg.is_progressive or jpeg.num_scans > 1 else 0
        if left < 0 or held > _MAX_HELD_PIXELS:
            return "TIFF data of more JPEG scans or pixels than its image has"
        if damage := jpeg_damage(jpeg):
            return damage
    return None


def _deflate_damage(strip: bytes) -> str | None:
    """Its checksum is at the end, which libtiff does not reach."""
    stream = zlib.decompressobj()
    rest = strip
    try:
        # In pieces: what it decompresses to is not to be held.
        while rest and not stream.eof:
            stream.decompress(rest, 1 << 20)
            rest = stream.unconsumed_tail
    except zlib.error as err:
        return f"TIFF data: {err}"
    return None if stream.eof else "TIFF data that ends early"


def _first_frame(data: bytes) -> tuple[int, bytes]:
    """Bits of the smallest code, and the codes, of a GIF file's first frame (GIF89a, section 20).

    Raises:
        IndexError: the file ends before.
    """
    place = 13 + _palette_size(data[10])
    while data[place] != 0x2C:
        if data[place] != 0x21:
            raise IndexError
        # An extension: a label and blocks.
        _, place = _blocks(data, place + 2)
    place += 10 + _palette_size(data[place + 9])
    codes, _ = _blocks(data, place + 1)
    return data[place], codes


def _palette_size(flags: int) -> int:
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def _blocks(data: bytes, place: int) -> tuple[bytes, int]:
    """Blocks up to the empty one, joined, and the place behind it."""
    parts = []
    while size := data[place]:
        parts.append(data[place + 1 : place + 1 + size])
        place += 1 + size
    return b"".join(parts), place + 1


def _count_pixels(codes: bytes, code_bits: int, most: int) -> int:
    """Pixels that LZW codes stand for, by the lengths of strings alone; stops beyond ``most``."""
    clear = 1 << code_bits
    lengths = [1] * clear + [0, 0]
    width, limit = code_bits + 1, clear << 1
    total = previous = 0
    held = num_held = 0
    codes_left = 2 * most + 16
    for byte in codes:
        held |= byte << num_held
        num_held += 8
        while num_held >= width:
            code = held & (limit - 1)
            held >>= width
            num_held -= width
            codes_left -= 1
            if code == clear:
                del lengths[clear + 2 :]
                width, limit, previous = code_bits + 1, clear << 1, 0
                continue
            if code == clear + 1:
                return total
            if previous and len(lengths) < _TABLE_SIZE:
                lengths.append(previous + 1)
                if len(lengths) == limit < _TABLE_SIZE:
                    width, limit = width + 1, limit << 1
            if code >= len(lengths) or total > most or codes_left < 0:
                return most + 1
            previous = lengths[code]
            total += previous
    return total
