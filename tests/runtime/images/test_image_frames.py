"""The frame of an image: as displayed or as stored, by any of the eight orientations."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gap_export.errors import UsageError
from gap_export.runtime.images.files import EncodedImage
from gap_export.runtime.images.image import read_image

PAD = (122, 116, 104)
KINDS: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
}


def encode(kind: str, orientation: int) -> bytes:
    y, x = np.mgrid[0:40, 0:64]
    pixels = np.stack([4 * x, 6 * y, 2 * (x + y)], axis=-1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, exif=exif, **KINDS[kind])
    return buffer.getvalue()


def turned(pixels: Any, orientation: int) -> Any:
    """By the table of EXIF 2.32: what row 0 and column 0 of the stored image are."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    cols = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::cols]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_raw_is_as_stored_and_upright_as_displayed(kind, orientation):
    data = encode(kind, orientation)
    plain = EncodedImage(data=encode(kind, 1), name="x")
    stored = np.asarray(read_image(plain, pad_color=PAD).image)
    # An open image of Pillow's, decoded or not, and a file are read alike.
    with Image.open(io.BytesIO(data)) as opened, Image.open(io.BytesIO(data)) as loaded:
        loaded.load()
        # Pillow itself turns a TIFF image that it decodes.
        as_stored = (loaded,) if kind != "TIFF" else ()
        for given in (EncodedImage(data=data, name="x"), opened, *as_stored):
            raw = read_image(given, pad_color=PAD, frame="raw")
            upright = read_image(given, pad_color=PAD, frame="upright")
            assert np.array_equal(np.asarray(raw.image), stored)
            assert np.array_equal(np.asarray(upright.image), turned(stored, orientation))
            assert raw.orientation == upright.orientation == orientation


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("form", ['="6"', ">6</tiff:Orientation>"])
def test_orientation_is_read_from_xmp_where_exif_has_none(kind, form):
    buffer = io.BytesIO()
    packet = f"<x tiff:Orientation{form}".encode()
    info: Any = {"xmp": packet}
    if kind == "PNG":
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_itxt("XML:com.adobe.xmp", packet.decode())
        info = {"pnginfo": text}
    Image.new("RGB", (8, 4)).save(buffer, kind, **info)
    loaded = read_image(EncodedImage(data=buffer.getvalue(), name="x"), pad_color=PAD)
    assert (loaded.orientation, loaded.image.size) == (6, (4, 8))


@pytest.mark.parametrize("value", [0, 9, 65_535])
def test_orientation_that_is_none_is_upright(value):
    loaded = read_image(EncodedImage(data=encode("PNG", value), name="x"), pad_color=PAD)
    assert (loaded.orientation, loaded.image.size) == (1, (64, 40))


def test_arrays_may_be_bgr(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, size=(5, 7, 4), dtype=np.uint8)
    rgb = rgba[..., :3]
    expected = np.asarray(read_image(rgb, pad_color=PAD).image)
    found = read_image(np.ascontiguousarray(rgb[..., ::-1]), pad_color=PAD, color="bgr").image
    assert np.array_equal(expected, rgb)
    assert np.array_equal(np.asarray(found), rgb)
    bgra = rgba[..., [2, 1, 0, 3]]
    for given, color in ((rgba, "rgb"), (bgra, "bgr")):
        loaded: Any = read_image(given, pad_color=PAD, color=color).image  # type: ignore[arg-type]
        assert np.array_equal(np.asarray(loaded), np.asarray(read_image(rgba, pad_color=PAD).image))


@pytest.mark.parametrize(
    ("image", "options", "reason"),
    [
        (np.zeros((4, 4, 3), np.uint8), {"color": "BGR"}, "no such color: 'BGR'"),
        (np.zeros((4, 4), np.uint8), {"color": "bgr"}, "order of an array's channels"),
        (Image.new("RGB", (4, 4)), {"color": "bgr"}, "order of an array's channels"),
        ("x.png", {"color": "bgr"}, "order of an array's channels"),
        (Image.new("RGB", (4, 4)), {"frame": "stored"}, "no such frame: 'stored'"),
    ],
)
def test_choice_that_says_nothing_is_refused(image, options, reason):
    with pytest.raises(UsageError, match=reason):
        read_image(image, pad_color=PAD, **options)
