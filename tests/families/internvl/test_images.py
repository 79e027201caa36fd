"""Tiles of InternVL's images against transformers' processor in its form for Pillow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from gap_export.runtime.images.geometry import nearest_canvas
from gap_export.runtime.images.image import prepare_image
from gap_export.spec.manifest import ImageSpec, TilesSpec
from tests.families.internvl.conftest import noise
from tests.families.tiny_internvl import canvases

TILE = 448
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# (width, height) with rows and columns of tiles, of at most six: (1, 1) is no tile but the image.
SHAPES = {
    (640, 480): (2, 3), (480, 640): (3, 2), (640, 360): (1, 2), (640, 640): (2, 2),
    (612, 612): (1, 1), (1300, 200): (1, 6), (200, 1300): (6, 1), (500, 375): (2, 3),
}  # fmt: skip


def spec_of(most: int = 6) -> ImageSpec:
    return ImageSpec(
        height=TILE,
        width=TILE,
        preparation="dynamic_tiles",
        pad_color=(0, 0, 0),
        resample="bicubic",
        mean=MEAN,
        std=STD,
        tiles=TilesSpec(resolutions=tuple((h, w) for h, w in canvases(most, TILE))),
    )


def theirs(image: Image.Image, most: int = 6) -> np.ndarray[Any, Any]:
    from transformers import GotOcr2ImageProcessorPil

    size = {"height": TILE, "width": TILE}
    processor = GotOcr2ImageProcessorPil(
        size=size, crop_to_patches=True, max_patches=most, image_mean=MEAN, image_std=STD
    )
    pixels: np.ndarray[Any, Any] = processor(image, return_tensors="np")["pixel_values"]
    return pixels


@pytest.mark.parametrize("size", SHAPES)
def test_tiles_and_thumbnail_equal_transformers(size: tuple[int, int]):
    rows, cols = SHAPES[size]
    pixels, geometry = prepare_image(noise(size), spec_of())
    wanted = theirs(noise(size))
    assert geometry.canvas == (None if rows * cols == 1 else (rows * TILE, cols * TILE))
    assert pixels.shape == wanted.shape == ((rows * cols) + (rows * cols > 1), 3, TILE, TILE)
    assert np.abs(pixels - wanted).max() <= 1e-5
    # The thumbnail is last: it is the image itself, squashed.
    squashed = np.asarray(noise(size).resize((TILE, TILE), Image.Resampling.BICUBIC), np.float32)
    last = pixels[-1].transpose(1, 2, 0) * np.float32(STD) + np.float32(MEAN)
    assert np.abs(last * 255 - squashed).max() <= 1e-3


@pytest.mark.parametrize(("most", "step"), [(6, 29), (12, 67)])
def test_canvas_is_chosen_as_by_transformers(most: int, step: int):
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    sizes = tuple((h, w) for h, w in canvases(most, TILE))
    sides = range(20, 1400, step)
    for height in sides:
        for width in sides:
            cols, rows = get_optimal_tiled_canvas((height, width), (TILE, TILE), 1, most)
            assert nearest_canvas((height, width), sizes) == (rows * TILE, cols * TILE)


@pytest.mark.parametrize(("side", "tiles"), [(633, 1), (634, 4), (448, 1), (896, 4)])
def test_of_equally_near_canvases_the_larger_is_taken_if_half_is_filled(side: int, tiles: int):
    # 2x2 tiles are 802,816 pixels: half of them, 401,408, lie between 633 and 634 squared.
    height, width = nearest_canvas((side, side), spec_of().tiles.resolutions)
    assert height * width == tiles * TILE * TILE
