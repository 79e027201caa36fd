"""Pixels of every preparation: against transformers, and against the families' recipes restated."""

from __future__ import annotations

import math
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from gap_export.runtime.boxes import parse_box, to_pixels
from gap_export.runtime.images.geometry import ImageGeometry, choose_canvas, fitted_size
from gap_export.runtime.images.image import load_image, prepare_image
from gap_export.runtime.images.preparations import input_frame, tile_layout
from gap_export.spec.manifest import BoxSpec, GridSpec, ImageSpec, TilesSpec

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def spec_of(preparation: Any, side: int, color: tuple[int, int, int]) -> ImageSpec:
    tiles = TilesSpec(resolutions=tuple((h, w) for h, w in PINPOINTS))
    return ImageSpec(
        height=side,
        width=side,
        preparation=preparation,
        pad_color=color,
        resample="bicubic",
        mean=MEAN,
        std=STD,
        tiles=tiles if preparation == "anyres" else None,
    )


LLAVA = spec_of("pad", 336, (122, 116, 104))
SHIKRA = spec_of("pad", 224, (255, 255, 255))
MINIGPT = spec_of("squash", 448, (0, 0, 0))
NEXT = spec_of("anyres", 336, (0, 0, 0))
ALL = pytest.mark.parametrize("spec", [LLAVA, SHIKRA, MINIGPT, NEXT], ids=lambda s: s.preparation)
SIZES = [(640, 480), (481, 641), (336, 336), (37, 500), (1, 9), (1500, 301), (1200, 1201)]


def photo(width: int, height: int) -> Image.Image:
    """Smooth shapes with hard edges and some noise, as images have."""
    rng = np.random.default_rng(width * 10_000 + height)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / 17 + c) * np.cos(y / 23 - c) * 90 + 128 for c in range(3)]
    pixels = np.stack(waves, axis=-1) + rng.normal(size=(height, width, 3)) * 12
    pixels[height // 3 : height // 2, width // 4 : width // 2] = (250, 10, 30)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def unit(pixel_values: Any) -> np.ndarray:
    """Normalisation undone: 0..1."""
    shape = (1, 3, 1, 1)
    return np.asarray(pixel_values) * np.reshape(STD, shape) + np.reshape(MEAN, shape)


def check_within_one_step(found: Any, expected: Any) -> None:
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    assert np.abs(unit(found) - unit(expected)).max() <= 1 / 255


@pytest.mark.parametrize("size", SIZES)
def test_padding_is_that_of_transformers_llava_processor(size):
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    processor = LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
    )
    expected = processor(photo(*size), return_tensors="np")["pixel_values"]
    found, geometry = prepare_image(photo(*size), LLAVA)
    check_within_one_step(found, np.asarray(expected))
    assert (geometry.width, geometry.height, geometry.canvas) == (*size, None)


def test_square_image_is_prepared_as_by_transformers_clip_processor():
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    for spec in (LLAVA, SHIKRA, MINIGPT):
        side = {"height": spec.height, "width": spec.width}
        processor = CLIPImageProcessorPil(size={"shortest_edge": spec.height}, crop_size=side)
        for size in ((500, 500), (100, 100)):
            expected = processor(photo(*size), return_tensors="np")["pixel_values"]
            check_within_one_step(prepare_image(photo(*size), spec)[0], np.asarray(expected))


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_those_of_transformers_llava_next_processor(size):
    from transformers.models.llava_next.image_processing_pil_llava_next import (
        LlavaNextImageProcessorPil,
    )

    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_grid_pinpoints=PINPOINTS,
    )
    expected = processor(photo(*size), return_tensors="np")["pixel_values"][0]
    found, geometry = prepare_image(photo(*size), NEXT)
    check_within_one_step(found, np.asarray(expected))
    assert geometry.canvas is not None
    layout = tile_layout(geometry, NEXT, GridSpec(rows=24, cols=24))
    assert layout is not None
    assert len(found) == layout.num_tiles


def test_canvas_is_that_of_transformers():
    from transformers.image_processing_utils import get_patch_output_size, select_best_resolution

    rng = np.random.default_rng(0)
    sides = np.exp(rng.uniform(0, math.log(5000), size=(600, 2))).astype(int)
    canvases = [(h, w) for h, w in PINPOINTS]
    for height, width in sides.tolist():
        canvas = choose_canvas((height, width), canvases)
        assert canvas == select_best_resolution((height, width), PINPOINTS)
        blank = np.broadcast_to(np.uint8(0), (3, height, width))
        assert fitted_size((height, width), canvas) == get_patch_output_size(
            blank, canvas, "channels_first"
        )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("spec", [LLAVA, SHIKRA], ids=["llava", "shikra"])
def test_padding_is_the_published_recipe(spec, size):
    """Where llava-hf's own config would crop: pad to a square, centred, then resize, then CLIP."""
    image = np.asarray(photo(*size))
    width, height = size
    side = max(size)
    top, left = (side - height) // 2, (side - width) // 2
    square = np.empty((side, side, 3), np.uint8)
    square[:] = spec.pad_color
    square[top : top + height, left : left + width] = image
    small = Image.fromarray(square).resize((spec.width,) * 2, Image.Resampling.BICUBIC)
    expected = (np.asarray(small) / 255 - MEAN) / STD
    check_within_one_step(prepare_image(photo(*size), spec)[0], expected.transpose(2, 0, 1)[None])


@pytest.mark.parametrize("size", SIZES)
def test_squashing_is_the_published_recipe(size):
    small = photo(*size).resize((448, 448), Image.Resampling.BICUBIC)
    expected = (np.asarray(small) / 255 - MEAN) / STD
    found, geometry = prepare_image(photo(*size), MINIGPT)
    check_within_one_step(found, expected.transpose(2, 0, 1)[None])
    assert geometry.canvas is None


def test_first_tile_shows_the_whole_image_squashed():
    image = photo(900, 300)
    squashed, _ = prepare_image(image, spec_of("squash", 336, (0, 0, 0)))
    found, geometry = prepare_image(image, NEXT)
    assert geometry.canvas == (336, 1008)
    assert (found[0] == squashed[0]).all()
    assert len(found) == 4


def test_tiles_are_cut_row_by_row_with_black_around_the_image():
    image = Image.new("RGB", (600, 500), (255, 255, 255))
    tiles = unit(prepare_image(image, NEXT)[0])[:, 0]
    # 672x560 in the middle of 672x672: 56 rows of black above and below.
    assert np.abs(tiles[0] - 1).max() < 1e-5
    for upper in tiles[1:3]:
        assert np.abs(upper[:56]).max() < 1e-5
        assert np.abs(upper[56:] - 1).max() < 1e-5
    for lower in tiles[3:]:
        assert np.abs(lower[:280] - 1).max() < 1e-5
        assert np.abs(lower[280:]).max() < 1e-5


def odd_images(folder: Path) -> dict[str, tuple[Any, tuple[int, int]]]:
    """What users have: each as a file or image, and its size (width, height) as displayed."""
    base = photo(61, 35)
    exif = Image.Exif()
    exif[0x0112] = 6
    base.save(folder / "turned.jpg", exif=exif)
    base.convert("L").save(folder / "gray.png")
    layer = base.copy()
    layer.putalpha(Image.linear_gradient("L").resize(base.size))
    layer.save(folder / "alpha.png")
    base.quantize(32).save(folder / "palette.png")
    wide = (np.asarray(base)[..., 0].astype(np.uint16) * 257).reshape(35, 61)
    Image.fromarray(wide).save(folder / "sixteen.png")
    sizes = {"turned.jpg": (35, 61)}
    names = ("turned.jpg", "gray.png", "alpha.png", "palette.png", "sixteen.png")
    return {name: (folder / name, sizes.get(name, (61, 35))) for name in names}


@ALL
def test_odd_images_go_through_every_preparation(spec, tmp_path):
    for name, (file, size) in odd_images(tmp_path).items():
        found, geometry = prepare_image(load_image(file, pad_color=spec.pad_color), spec)
        assert (geometry.width, geometry.height) == size, name
        assert found.shape[1:] == (3, spec.height, spec.width)
        assert np.isfinite(found).all()
        values = unit(found)
        assert -1e-5 <= values.min() < values.max() <= 1 + 1e-5
        if name in ("gray.png", "sixteen.png") and spec.preparation == "squash":
            assert np.abs(values - values[:, :1]).max() < 1e-5


@ALL
@pytest.mark.parametrize("size", [(60_000, 2), (2, 60_000), (1_000_000, 1), (1, 1)])
def test_extreme_shapes_are_prepared_in_little_memory(spec, size):
    image = Image.new("RGB", size, "red")
    tracemalloc.start()
    found, geometry = prepare_image(image, spec)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (geometry.width, geometry.height) == size
    assert found.shape[1:] == (3, spec.height, spec.width)
    # numpy's share; Pillow's own is bounded by the sizes it is asked for.
    assert peak < 100_000_000


PADDED = BoxSpec(syntax="bracketed", scale=1.0, frame="padded_square")
ANGLED = BoxSpec(syntax="angled", scale=100.0, frame="image")
SIDES = st.one_of(st.just(1), st.integers(1, 40), st.integers(1, 4000))


def written(fractions: list[float], box: BoxSpec, decimals: int) -> str:
    if box.syntax == "angled":
        return "{" + "".join(f"<{round(value * box.scale)}>" for value in fractions) + "}"
    return "[" + ", ".join(f"{value * box.scale:.{decimals}f}" for value in fractions) + "]"


@pytest.mark.parametrize(
    ("spec", "box", "decimals", "step"),
    [(LLAVA, PADDED, 2, 0.01), (SHIKRA, PADDED, 3, 0.001), (MINIGPT, ANGLED, 0, 0.01)],
    ids=["llava", "shikra", "minigpt-v2"],
)
@settings(deadline=None)
@given(width=SIDES, height=SIDES, data=st.data())
def test_box_goes_to_the_model_s_frame_and_back(spec, box, decimals, step, width, height, data):
    x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x2, y2 = data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height))
    # Forward, as the family prepares an image, in its own words.
    side = max(width, height)
    span_x, span_y = (side, side) if spec.preparation == "pad" else (width, height)
    shift_x = (span_x - width) // 2
    shift_y = (span_y - height) // 2
    fractions = [
        (x1 + shift_x) / span_x,
        (y1 + shift_y) / span_y,
        (x2 + shift_x) / span_x,
        (y2 + shift_y) / span_y,
    ]
    parsed = parse_box(f"Answer: {written(fractions, box, decimals)} .", box)
    assert parsed is not None
    geometry = ImageGeometry(width=width, height=height)
    found = to_pixels(parsed, box, geometry)
    slack_x, slack_y = 0.5 * step * span_x + 1e-6, 0.5 * step * span_y + 1e-6
    if found is None:
        # Rounding made it vanish, which only happens to boxes thinner than a step.
        assert x2 - x1 <= 2 * slack_x or y2 - y1 <= 2 * slack_y
        return
    for value, true, slack in zip(found, (x1, y1, x2, y2), (slack_x, slack_y) * 2, strict=True):
        assert abs(value - true) <= slack


@settings(deadline=None)
@given(width=SIDES, height=SIDES)
def test_grids_of_a_tiled_image_cover_it(width, height):
    canvas = choose_canvas((height, width), NEXT.tiles.resolutions if NEXT.tiles else [])
    geometry = ImageGeometry(width=width, height=height, canvas=canvas)
    layout = tile_layout(geometry, NEXT, GridSpec(rows=24, cols=24))
    assert layout is not None
    base = input_frame(geometry, NEXT)
    assert (base.left, base.top, base.width, base.height) == (0, 0, width, height)
    frame = geometry.tiles_frame(NEXT, layout)
    if layout.num_rows * layout.num_cols == 0:
        return
    # A token's worth of rounding at most, on each side.
    for start, span, size, cells in (
        (frame.left, frame.width, width, layout.num_cols),
        (frame.top, frame.height, height, layout.num_rows),
    ):
        token = span / cells
        assert -1.01 * token <= start <= 1.01 * token
        assert abs(start + span - size) <= 1.01 * token


def test_tiles_frame_at_known_numbers():
    # 600x500 becomes 672x560 on 672x672: 4 rows of tokens above and below show nothing.
    geometry = ImageGeometry(width=600, height=500, canvas=(672, 672))
    layout = tile_layout(geometry, NEXT, GridSpec(rows=24, cols=24))
    assert layout is not None
    assert (layout.first_row, layout.num_rows) == (4, 40)
    frame = geometry.tiles_frame(NEXT, layout)
    assert (frame.left, frame.width) == (0, 600)
    assert frame.top == pytest.approx(0)
    assert frame.height == pytest.approx(500)
