"""Which smaller image stands beside a pruned one, what it costs, and where a report shows it."""

from __future__ import annotations

import math
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gap_export.bundle import open_bundle
from gap_export.errors import UsageError
from gap_export.evaluation.job import DEFAULT_ASKING, Job, ModelFacts
from gap_export.evaluation.measure import RunnerOptions
from gap_export.evaluation.smaller_image import count_stages, smaller_grid, smaller_recipe
from gap_export.families import on_canvas
from gap_export.progress import SilentProgress
from gap_export.report.evaluation import document_of_evaluation
from gap_export.report.markdown import to_markdown
from gap_export.spec.canvas import with_canvas
from gap_export.spec.recipe import find_recipe

SIDES = st.integers(1, 40)


@pytest.mark.parametrize(
    ("grid", "num_tokens", "wanted"),
    [
        # Qwen3-VL, 640 x 480: 15 x 20 tokens of 32 px, keep 0.5, 0.3, 0.1.
        ((15, 20), 150, (11, 14)),
        ((15, 20), 90, (8, 11)),
        ((15, 20), 30, (5, 6)),
        ((20, 15), 90, (11, 8)),
        # Qwen2.5-VL, 644 x 476, keep 0.3.
        ((17, 23), 117, (9, 13)),
        ((24, 24), 173, (13, 13)),
        ((12, 16), 58, (6, 9)),
        ((1, 9), 4, (1, 4)),
        ((3, 4), 12, (3, 4)),
        ((3, 4), 1, (1, 1)),
    ],
)
def test_the_grid_of_nearest_number_and_the_same_aspect(grid, num_tokens, wanted):
    assert smaller_grid(grid, num_tokens) == wanted


@given(rows=SIDES, cols=SIDES, share=st.floats(0, 1))
def test_no_grid_of_that_aspect_has_a_nearer_number(rows, cols, share):
    num_tokens = max(1, round(share * rows * cols))
    found = smaller_grid((rows, cols), num_tokens)
    assert 1 <= found[0] <= rows and 1 <= found[1] <= cols
    # By rows and by columns: the two numbers on either side of the exact one.
    grids = {(r, c) for r in range(1, rows + 1) for c in beside(r * cols, rows) if c <= cols}
    grids |= {(r, c) for c in range(1, cols + 1) for r in beside(c * rows, cols) if r <= rows}
    assert found in grids
    least = min(abs(r * c - num_tokens) for r, c in grids)
    assert abs(found[0] * found[1] - num_tokens) == least


def beside(number: int, divisor: int) -> set[int]:
    exact = number / divisor
    return {max(1, math.floor(exact)), max(1, math.ceil(exact))}


@given(rows=SIDES, cols=SIDES)
def test_all_tokens_are_the_same_image(rows, cols):
    assert smaller_grid((rows, cols), rows * cols) == (rows, cols)


def recipe_of(name: str):
    return find_recipe(name)[0]


def test_of_several_canvases_each_has_a_smaller_one_of_its_aspect():
    recipe = on_canvas(recipe_of("qwen3-vl-4b"), "640x480,480x640,800x384")
    smaller = smaller_recipe(recipe, 90)
    assert len({rows * cols for rows, cols in smaller.image.grids}) == 1
    assert abs(smaller.grid.num_visual_tokens - 90) < 10
    for (rows, cols), (row, col) in zip(recipe.image.grids, smaller.image.grids, strict=True):
        assert abs(col * rows - row * cols) < 2 * max(rows, cols)
    pair = on_canvas(recipe_of("qwen3-vl-4b"), "640x480,480x640")
    assert smaller_recipe(pair, 90).image.grids == ((8, 11), (11, 8))
    assert smaller_recipe(pair, 1).image.grids == ()


def test_a_model_that_takes_any_size_is_shown_a_smaller_one():
    recipe = recipe_of("qwen2.5-vl-7b")
    smaller = smaller_recipe(recipe, 117)
    assert (smaller.grid.rows, smaller.grid.cols) == (9, 13)
    assert (smaller.image.height, smaller.image.width) == (252, 364)
    assert smaller.architecture.vision.canvas == (252, 364)
    # Its boxes are pixels of that image, x before y.
    assert smaller.box.scale == (364.0, 252.0)
    assert with_canvas(smaller, recipe.image.height, recipe.image.width) == recipe
    assert smaller_recipe(recipe, recipe.grid.num_visual_tokens) is None
    assert smaller_recipe(recipe_of("qwen3-vl-4b"), 90).box == recipe_of("qwen3-vl-4b").box


def test_of_tiles_and_a_thumbnail_the_thumbnail_is_smaller():
    recipe = recipe_of("internvl3.5-2b")
    smaller = smaller_recipe(recipe, 77)
    assert (smaller.image.preparation, smaller.image.tiles) == ("squash", None)
    assert smaller.grid == recipe.grid and smaller.box == recipe.box


@pytest.mark.parametrize("name", ["llava-1.5-7b", "llava-1.6-vicuna-7b", "minigpt-v2"])
def test_a_model_of_one_size_has_no_smaller_image(name):
    assert smaller_recipe(recipe_of(name), 40) is None


@pytest.mark.parametrize(("height", "width"), [(480, 650), (481, 640), (0, 640), (-32, 640)])
def test_a_canvas_is_made_of_whole_tokens(height, width):
    with pytest.raises(UsageError, match=r"32 px wide and 32 px high.*a multiple of 32"):
        with_canvas(recipe_of("qwen3-vl-2b"), height, width)


def test_costs_are_those_of_the_shapes_by_hand(tiny_bundle):
    manifest = open_bundle(tiny_bundle).manifest
    decoder, length = manifest.decoder, 17
    once = count_stages(tiny_bundle, num_images=1, prompt_length=length)
    assert count_stages(tiny_bundle, num_images=2.5, prompt_length=length) == {
        "vision": round(2.5 * once["vision"]),
        "prefill": once["prefill"],
    }
    # Of lengths 1, 2 and 3: the head reads the last token alone, weights each, attention all pairs.
    one, two, three = (
        count_stages(tiny_bundle, num_images=1, prompt_length=n)["prefill"] for n in (1, 2, 3)
    )
    heads = decoder.hidden_size // decoder.head_dim
    pairs = 2 * decoder.num_layers * heads * decoder.head_dim
    assert three - 2 * two + one == 2 * pairs
    linear = two - one - 3 * pairs
    head = one - linear - pairs
    assert head == decoder.hidden_size * decoder.vocab_size
    assert once["prefill"] == head + length * linear + length**2 * pairs


def test_a_smaller_image_stands_behind_the_pruned_one(tiny_bundle, tiny_whole_bundle, tmp_path):
    manifest = open_bundle(tiny_bundle).manifest
    rival = tmp_path / "rival"
    shutil.copytree(tiny_whole_bundle, rival)
    facts = ModelFacts(
        family=manifest.model.family,
        prompt=manifest.prompt,
        box=manifest.box,
        reads_question=False,
    )
    job = Job.prepare(DEFAULT_ASKING, RunnerOptions(), facts, 4, SilentProgress())
    report = job.measure(
        tiny_whole_bundle, [tiny_bundle], SilentProgress(), smaller={tiny_bundle: rival}
    )
    side = f"{manifest.image.width}x{manifest.image.height}"
    pruned, name = "spatial keep 0.3", f"smaller-image {side}"
    names = ["unpruned", f"{pruned} compact", f"{pruned} gap", name]
    assert [row.name for row in report.rows] == names
    assert (report.rows[-1].pruner, report.rows[-1].positions) == ("none", "smaller-image")
    pairs = [(one.first, one.second) for one in report.comparisons]
    assert (f"{pruned} gap", name) in pairs and len(pairs) == 3
    unpruned, _, gap, smaller = (row.multiply_adds for row in report.rows)
    assert unpruned == smaller
    assert gap["vision"] <= unpruned["vision"] and gap["prefill"] < unpruned["prefill"]
    page = to_markdown(document_of_evaluation(report))
    assert "Until the answer begins" in page and name in page
    plain = job.measure(tiny_whole_bundle, [tiny_bundle], SilentProgress())
    assert not any(row.multiply_adds for row in plain.rows)
    assert "Until the answer begins" not in to_markdown(document_of_evaluation(plain))
