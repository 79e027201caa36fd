"""Whatever image a user has: used as displayed, or refused with one clear message."""

from __future__ import annotations

import dataclasses
import os
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gap_export.errors import ImageError
from gap_export.runtime.images.image import load_image, prepare_image
from gap_export.spec.manifest import ImageSpec

PAD = (122, 116, 104)


def load(image: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    loaded = load_image(image, pad_color=PAD)
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


@pytest.fixture
def pixels() -> Any:
    return np.random.default_rng(0).integers(0, 256, size=(5, 7, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_file_gives_its_pixels(tmp_path, pixels, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(pixels).save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert (load(path) == pixels).all()
    assert (load(str(path)) == pixels).all()


def test_image_and_array_give_the_same_pixels(pixels):
    assert (load(pixels) == pixels).all()
    assert (load(Image.fromarray(pixels)) == pixels).all()


def test_gray_is_repeated_over_the_channels(tmp_path, pixels):
    gray = pixels[..., 0]
    Image.fromarray(gray).save(tmp_path / "x.png")
    for given_as in (tmp_path / "x.png", gray):
        assert (load(given_as) == gray[..., None].repeat(3, axis=2)).all()


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    wide = np.asarray([[0, 257, 25700, 65535]], dtype=np.uint16)
    Image.fromarray(wide).save(tmp_path / "x.png")
    assert load(tmp_path / "x.png")[0, :, 0].tolist() == [0, 1, 100, 255]


def test_transparent_parts_show_the_pad_color(tmp_path):
    image = Image.new("RGBA", (3, 1), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 255, 0, 0))
    image.putpixel((2, 0), (PAD[0] + 100, PAD[1], PAD[2], 128))
    image.save(tmp_path / "x.png")
    found = load(tmp_path / "x.png")[0]
    assert found[0].tolist() == [255, 0, 0]
    assert found[1].tolist() == list(PAD)
    assert abs(int(found[2][0]) - (PAD[0] + 50)) <= 1


def test_palette_with_a_transparent_entry_shows_the_pad_color(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "x.png")
    image.save(tmp_path / "transparent.png", transparency=1)
    assert load(tmp_path / "x.png")[0].tolist() == [[255, 0, 0], [0, 0, 255]]
    assert load(tmp_path / "transparent.png")[0].tolist() == [[255, 0, 0], list(PAD)]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "CMYK", "YCbCr", "HSV", "I", "I;16"])
def test_white_is_white_in_every_mode(mode):
    white = {"1": 1, "L": 255, "LA": (255, 255), "CMYK": (0, 0, 0, 0), "YCbCr": (255, 128, 128),
             "HSV": (0, 0, 255), "I": 65535, "I;16": 65535}[mode]  # fmt: skip
    assert load(Image.new(mode, (2, 2), white)).min() == 255


def test_cmyk_jpeg_is_read(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "x.jpg")
    red, green, blue = load(tmp_path / "x.jpg")[4, 4]
    assert red > 200
    assert max(green, blue) < 60


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert load(tmp_path / "x.gif")[0, 0].tolist() == [255, 0, 0]


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and brings hardly any pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0\0\0\0"))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (b"hello, I am text\n" * 50, "not an image that can be read"),
        (b"\x89PNG\r\n\x1a\n", "not an image|damaged"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image that can be read"),
        (png_header(8001, 8001), "too large: .*8001x8001 pixels.*at most 64,000,000"),
        (png_header(10000, 10000), "too large"),
        (png_header(100_000, 100_000), "too large"),
        (png_header(10, 10), "damaged or not complete"),
    ],
    ids=["empty", "text", "magic only", "eps", "large", "larger", "bomb", "no pixels"],
)
def test_file_that_is_no_usable_image_is_refused(tmp_path, content, message):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ImageError, match=message):
        load(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "gif", "tiff", "webp"])
def test_truncated_file_is_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, size=(64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ImageError, match=r"damaged|not an image"):
        load(path)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]), st.data())
def test_damaged_file_is_refused_or_read_but_never_a_traceback(tmp_path_factory, kind, data):
    path = tmp_path_factory.getbasetemp() / "damaged"
    noise = np.random.default_rng(0).integers(0, 256, size=(16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, format=kind)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        assert load(path).ndim == 3
    except ImageError:
        return


def test_missing_folder_and_pipe_are_told_apart(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in [
        ("missing.png", "no such image"),
        ("", "this is a folder"),
        ("pipe", "not a plain file"),
    ]:
        with pytest.raises(ImageError, match=message):
            load(tmp_path / name)


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 5000])
def test_impossible_path_is_refused(path):
    with pytest.raises(ImageError, match=r"cannot be read|no such image"):
        load(path)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros((1, 4, 4, 3), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0), np.uint8),
        np.zeros(4, np.uint8),
    ],
)
def test_array_that_is_no_image_is_refused(array):
    with pytest.raises(ImageError, match="an array that is not an image"):
        load(array)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_image_without_pixels_is_refused(size):
    with pytest.raises(ImageError, match="no pixels"):
        load(Image.new("RGB", size))


@pytest.mark.parametrize("thing", [None, 5, b"bytes", [[0]], open])
def test_thing_that_is_no_image_is_refused(thing):
    with pytest.raises(ImageError, match="not an image: "):
        load(thing)


def test_floating_point_image_is_refused_with_the_reason():
    with pytest.raises(ImageError, match=r"pixel format has no agreed range.*floating-point"):
        load(Image.new("F", (2, 2)))


@pytest.mark.parametrize("value", [-1, 65_536, 2_000_000_000])
def test_32_bit_integers_beyond_16_bits_are_refused_with_the_reason(tmp_path, value):
    wide = Image.fromarray(np.asarray([[0, value]], dtype=np.int32))
    assert wide.mode == "I"
    wide.save(tmp_path / "wide.tiff")
    with pytest.raises(ImageError, match=r"no agreed range.*32-bit integers.*8 bits") as caught:
        load(tmp_path / "wide.tiff")
    assert "damaged" not in str(caught.value)


def test_32_bit_integers_within_16_bits_are_read_as_16_bits(tmp_path):
    wide = np.asarray([[0, 32_896, 65_535]], dtype=np.int32)
    Image.fromarray(wide).save(tmp_path / "wide.tiff")
    assert load(tmp_path / "wide.tiff")[0, :, 0].tolist() == [0, 128, 255]


def normalized(image: Image.Image, spec: ImageSpec) -> np.ndarray[Any, Any]:
    planes = [(np.asarray(image)[..., c] / 255.0 - spec.mean[c]) / spec.std[c] for c in range(3)]
    return np.stack(planes)[None]


def test_squashing_ignores_the_aspect_ratio(sample_manifest):
    spec = dataclasses.replace(
        sample_manifest.image, preparation="squash", resample="bilinear", height=16, width=24
    )
    noise = Image.effect_noise((50, 20), 90).convert("RGB")
    found, _ = prepare_image(noise, spec)
    expected = normalized(noise.resize((24, 16), Image.Resampling.BILINEAR), spec)
    np.testing.assert_allclose(found, expected, atol=1e-5)
