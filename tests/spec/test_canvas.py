"""Recipes for images of another size than the one they are written for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gap_export.errors import UsageError
from gap_export.families import on_canvas
from gap_export.spec.canvas import choose_canvas, with_canvas
from gap_export.spec.recipe import find_recipe

QWEN3, QWEN2_5 = (find_recipe(name)[0] for name in ("qwen3-vl-2b", "qwen2.5-vl-3b"))


def test_another_canvas_changes_the_image_the_grid_and_the_tower_alone():
    recipe = on_canvas(QWEN3, "480x640")
    assert recipe.architecture is not None
    assert (recipe.image.height, recipe.image.width) == (640, 480)
    assert (recipe.grid.rows, recipe.grid.cols) == (20, 15)
    assert recipe.architecture.vision.image_size == (640, 480)
    assert with_canvas(recipe, 480, 640) == QWEN3
    assert (recipe.box, recipe.prompt) == (QWEN3.box, QWEN3.prompt)


def test_boxes_in_pixels_follow_the_canvas():
    assert QWEN2_5.box.scale == (644, 476)
    assert on_canvas(QWEN2_5, "448x672").box.scale == (448, 672)


def test_one_number_that_is_the_side_of_a_square_canvas_is_pixels():
    square = on_canvas(QWEN2_5, "672x672")
    square = square.model_copy(update={"box": replace(square.box, scale=672.0)})
    assert on_canvas(square, "448x672").box.scale == (448, 672)
    assert on_canvas(square, "448x448").box.ends == (448, 448)
    thousandths = square.model_copy(update={"box": replace(square.box, scale=1000.0)})
    assert on_canvas(thousandths, "448x448").box.scale == 1000


def test_without_a_canvas_the_recipe_is_as_it_was():
    assert on_canvas(QWEN3, None) is QWEN3


@pytest.mark.parametrize(
    ("canvas", "why"),
    [
        ("", "a canvas is width x height in pixels"),
        ("640", "such as 640x480"),
        ("640x480x3", "such as 640x480"),
        ("-640x480", "such as 640x480"),
        ("640 x 480", "such as 640x480"),
        ("\u0666\u0664x32", "such as 640x480"),
        ("650x480", "650 px wide; allowed: a multiple of 32, such as 640 or 672"),
        ("640x490", "490 px high; allowed: a multiple of 32, such as 480 or 512"),
        ("640x0", "0 px high; allowed: a multiple of 32, such as 32"),
        ("16x32", "16 px wide; allowed: a multiple of 32, such as 32"),
        ("16384x16384", "a canvas is too large"),
        ("32x99968", r"this canvas cannot be used: 32x99968; allowed: image.height must be 1\.\."),
    ],
)
def test_a_canvas_that_cannot_be_is_refused_with_those_that_can(canvas, why):
    with pytest.raises(UsageError, match=why):
        on_canvas(QWEN3, canvas)


def test_a_model_of_one_size_is_refused_another():
    demo = find_recipe("demo")[0]
    with pytest.raises(UsageError, match="sees images of one size: 128x96; allowed: 96x96"):
        on_canvas(demo, "128x96")
    assert choose_canvas(demo, "96x96", takes_any=False) is demo
