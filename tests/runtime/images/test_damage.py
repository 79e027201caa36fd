"""Files that a decoder recovers from, or that use up time or memory: refused, with the reason."""

from __future__ import annotations

import io
import struct
import threading
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from gap_export.errors import ImageError
from gap_export.runtime.images.files import EncodedImage
from gap_export.runtime.images.image import read_image

PAD = (122, 116, 104)
SIZE = (160, 120)


def scene(size: tuple[int, int] = SIZE) -> Image.Image:
    """Smooth, with edges, as photographs are."""
    noise = np.random.default_rng(0).integers(0, 256, size=(12, 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size).filter(ImageFilter.GaussianBlur(1))


def encode(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or scene()).save(buffer, kind, **options)
    return buffer.getvalue()


def read(data: bytes, **options: Any) -> Any:
    return read_image(EncodedImage(data=data, name="the file"), pad_color=PAD, **options)


GOOD = {
    "jpeg": encode("JPEG"),
    "jpeg gray": encode("JPEG", scene().convert("L")),
    "jpeg cmyk": encode("JPEG", scene().convert("CMYK")),
    "jpeg rgb": encode("JPEG", keep_rgb=True),
    "jpeg 4:4:4": encode("JPEG", subsampling=0, optimize=True),
    "progressive": encode("JPEG", progressive=True),
    "restarts": encode("JPEG", restart_marker_blocks=4),
    "gif": encode("GIF"),
    "gif interlaced": encode("GIF", scene().quantize(16), interlace=1),
    "gif gray": encode("GIF", scene().convert("L")),
    "gif two colors": encode("GIF", scene().convert("1")),
    "tiff": encode("TIFF"),
    "tiff deflate": encode("TIFF", compression="tiff_adobe_deflate"),
    "tiff lzw": encode("TIFF", compression="tiff_lzw"),
    "tiff jpeg": encode("TIFF", compression="jpeg"),
    "tiff packbits": encode("TIFF", compression="packbits"),
    "png": encode("PNG"),
    "webp": encode("WEBP", lossless=True),
    "bmp": encode("BMP"),
    "ppm": encode("PPM"),
}


@pytest.mark.parametrize("name", GOOD)
def test_file_in_order_gives_the_pixels_pillow_does(name):
    loaded = read(GOOD[name])
    with Image.open(io.BytesIO(GOOD[name])) as opened:
        expected = np.asarray(opened.convert("RGB"))
    assert np.array_equal(np.asarray(loaded.image), expected)
    assert (loaded.orientation, loaded.warnings) == (1, ())


def at(data: bytes, share: float) -> int:
    return int(len(data) * share)


def zeros(data: bytes, share: float) -> bytes:
    return data[: at(data, share)] + bytes(48) + data[at(data, share) + 48 :]


def without(data: bytes, share: float) -> bytes:
    return data[: at(data, share)] + data[at(data, share) + 24 :]


def twice(data: bytes, share: float) -> bytes:
    return data[: at(data, share)] + data[at(data, share) - 24 :]


def cut(data: bytes, share: float) -> bytes:
    return data[: at(data, share)]


@pytest.mark.parametrize("damage", [zeros, without, twice, cut])
@pytest.mark.parametrize(
    "name", ["jpeg gray", "progressive", "gif", "tiff deflate", "tiff jpeg", "png"]
)
def test_damage_that_decoders_recover_from_is_refused(name, damage):
    for share in (0.5, 0.6, 0.7, 0.85):
        with pytest.raises(ImageError, match="damaged or not complete"):
            read(damage(GOOD[name], share))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (GOOD["jpeg"][:-2], "ends before its image does"),
        (GOOD["jpeg"][:-40] + GOOD["jpeg"][-2:], "premature end of data segment"),
        (GOOD["jpeg"][:-2] + b"\x55" * 40 + GOOD["jpeg"][-2:], "extraneous bytes"),
        (GOOD["restarts"].replace(b"\xff\xd1", b"\xff\xd4", 1), "[Cc]orrupt"),
        (GOOD["jpeg"][:2] + b"\x12\x34" + GOOD["jpeg"][2:], "not an image"),
        (GOOD["jpeg"][:20] + b"\0\0" + GOOD["jpeg"][20:], "no JPEG marker at byte 20"),
        (GOOD["png"][:-12], "the PNG file ends before its image does"),
        (GOOD["png"][:-20] + bytes(20), "a PNG chunk at byte .* whose checksum is wrong"),
    ],
    ids="end short surplus restart start segment png-end png-crc".split(),
)
def test_reason_of_a_refusal_is_named(data, reason):
    with pytest.raises(ImageError, match=reason):
        read(data)


def gray(sampling: int, frame: bytes, scan: bytes, codes: bytes, **options: Any) -> bytes:
    """A JPEG of 32x16, of other sampling, frame and scan than Pillow writes."""
    data = bytearray(encode("JPEG", Image.new("RGB", (32, 16), (128,) * 3), **options))
    place = data.index(b"\xff\xc0")
    data[place : place + 2] = frame
    data[place + 11] = sampling
    end = data.index(b"\xff\xda") + 14
    data[end - 3 : end] = scan
    return bytes(data[:end]) + codes + b"\xff\xd9"


# Eight blocks of luma and two of chroma, all empty: 001010 and 0000 in the tables of the standard.
EMPTY = int("001010" * 8 + "0000" * 2, 2).to_bytes(7, "big")
UNCOMMON = {
    "4:1:0": gray(0x42, b"\xff\xc0", b"\0\x3f\0", EMPTY, subsampling=0),
    # Each sample is the one before it: 00.
    "lossless": gray(0x11, b"\xff\xc3", b"\1\0\0", bytes(32 * 16 * 3 // 4), keep_rgb=True),
    "fax 4": encode("TIFF", Image.new("1", (32, 16)), compression="group4"),
    "lzma": encode("TIFF", Image.new("RGB", (32, 16)), compression="lzma"),
}


@pytest.mark.parametrize("name", UNCOMMON)
def test_form_that_cannot_be_checked_is_read_and_said(name):
    """Of a lossless JPEG simplejpeg would write more than it has room for."""
    loaded = read(UNCOMMON[name])
    assert loaded.image.size == (32, 16)
    assert len(loaded.image.getcolors() or ()) == 1
    (warning,) = loaded.warnings
    assert warning.startswith("the image could not be checked for damage: ")


def test_changed_codes_of_a_gif_are_seen_by_the_number_of_pixels():
    """A code may become one of a string that is as long, and nothing has a checksum."""
    places = range(800, len(GOOD["gif"]) - 20, 100)
    seen = by_pillow = 0
    for place in places:
        changed = bytearray(GOOD["gif"])
        changed[place] ^= 0x41
        try:
            with Image.open(io.BytesIO(changed)) as opened:
                opened.load()
        except OSError:
            by_pillow += 1
        try:
            read(bytes(changed))
        except ImageError:
            seen += 1
    assert seen > len(places) / 2 > by_pillow


@pytest.mark.parametrize("name", ["jpeg", "progressive", "gif", "tiff jpeg", "png"])
def test_allow_damaged_uses_what_can_be_decoded_and_says_so(name):
    good = np.asarray(read(GOOD[name]).image)
    # Of TIFF the directory is behind the pixels.
    damage = zeros if name.startswith("tiff") else without
    loaded = read(damage(GOOD[name], 0.93 if name == "jpeg" else 0.7), allow_damaged=True)
    found = np.asarray(loaded.image)
    assert found.shape == good.shape
    (warning,) = loaded.warnings
    assert warning.startswith("the image is damaged, and was used all the same: ")
    if name != "gif":
        # An interlaced GIF is damaged all over.
        assert np.array_equal(found[:40], good[:40]) or name == "progressive"
        assert not np.array_equal(found, good)


def test_image_that_pillow_has_not_decoded_yet_is_checked(tmp_path):
    (tmp_path / "x.jpg").write_bytes(GOOD["jpeg"][:-40] + GOOD["jpeg"][-2:])
    with Image.open(tmp_path / "x.jpg") as opened, pytest.raises(ImageError, match="premature end"):
        read_image(opened, pad_color=PAD)


def scans(count: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    data = encode("JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * count + b"\xff\xd9"


def segment(marker: int, content: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content


def tiff_of_large_strips(size: int) -> bytes:
    data = encode("TIFF", compression="jpeg")
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", size, size) + data[place + 4 :]


JPEG_START, JPEG_REST = GOOD["jpeg"][:2], GOOD["jpeg"][2:]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, color_type: int, *extra: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    bands = {2: 3, 6: 4}[color_type]
    rows = zlib.compress(bytes(width * bands + 1) * min(height, 64))
    parts = [chunk(b"IHDR", header), *extra, chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff_tags(count: int, values: int) -> bytes:
    """A TIFF file with as many tags, each said to have as many values of 4 bytes."""
    entries = b"".join(struct.pack("<HHII", 300 + n, 4, values, 8) for n in range(count))
    return b"II*\0" + struct.pack("<IH", 8, count) + entries + bytes(4)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (scans(100), r"too many scans: .*1\d\d of 160x120 pixels.*at most 64"),
        (JPEG_START + segment(0xE1, b"Exif\0\0" + b"x") * 100_000 + JPEG_REST, "10000 JPEG segm"),
        (JPEG_START + segment(0xC4, b"") * 100_000 + JPEG_REST, "10000 JPEG segm"),
        (GOOD["jpeg"][:-2] + b"\xff" * 500_000 + b"\0", "ends before its image does"),
        (tiff_of_large_strips(65_000), "more JPEG scans or pixels than its image has"),
        (png(8001, 8001, 2), "too large: .*8001x8001"),
        (png(70_000, 70_000, 2), "too large: .*70000x70000"),
        (png(100, 100, 2, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64 << 20)))), "large"),
        (tiff_tags(900, 20), "tags up to .* hold more bytes than the file"),
        (tiff_tags(3, 4_000_000), "tags up to .* hold more bytes than the file"),
        (tiff_tags(1001, 1), "1001 tags; allowed: 1000"),
        (b"GIF89a" + struct.pack("<HHBBB", 2049, 2048, 0, 0, 0) + b",", "too large|damaged"),
        (b"RIFF\x1e\0\0\0WEBPVP8X" + b"\x0a\0\0\0\x02\0\0\0" + b"\xff\xff\0" * 2, "large|damaged"),
        (b"P6 60000 60000 255\n", "too large: .*60000x60000"),
    ],
    ids="scans exif tables fill strips png bomb text tags values many-tags gif webp ppm".split(),
)
def test_file_made_to_use_up_time_or_memory_is_refused_before_it_is_decoded(data, reason):
    with pytest.raises(ImageError, match=reason):
        read(data)


def test_broken_file_is_limited_as_well():
    for broken in (scans(100)[:-2], scans(100)[:20] + b"\0" + scans(100)[20:]):
        with pytest.raises(ImageError, match="too many scans"):
            read(broken, allow_damaged=True)


def test_progressive_file_is_limited_by_its_coefficients():
    """64 megapixels are within the limit as RGB, and not with six more bytes a pixel."""
    size = struct.pack(">HH", 8000, 8000)
    for data, reason in ((GOOD["progressive"], "would take 6"), (GOOD["jpeg"], "damaged")):
        place = data.index(b"\xff\xc2" if data is GOOD["progressive"] else b"\xff\xc0") + 5
        with pytest.raises(ImageError, match=reason):
            read(data[:place] + size + data[place + 4 :])


def corrupt_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0110] = "a camera of a long name"
    data = encode("JPEG", exif=exif)
    place = data.index(b"Exif\0\0") + 6
    return data[: place + 4] + b"\xff\xff\0\0" + data[place + 8 :]


def test_exif_data_that_cannot_be_read_is_told():
    (warning,) = read(corrupt_exif()).warnings
    assert "EXIF data is damaged" in warning


def test_threads_leave_warnings_as_they_were():
    """Pillow warns of large sizes and of damaged metadata; nothing is switched off for that."""
    before = list(warnings.filters)
    files = [corrupt_exif(), png(9700, 9700, 2), *GOOD.values()]

    def work() -> None:
        for data in files * 3:
            try:
                read(data)
            except ImageError as err:
                assert "too large" in str(err)  # noqa: PT017

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert warnings.filters == before
    with pytest.warns(UserWarning, match="still shows"):
        warnings.warn("it still shows", UserWarning, stacklevel=1)
