"""Several canvases of as many visual tokens in one bundle, which has one set of weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image

import gap_export
from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.cli import main
from gap_export.errors import CheckpointError, UsageError
from gap_export.evaluation.baseline import check_baseline
from gap_export.families import build_reference, on_canvas, resolve_pruning
from gap_export.families.qwen_vl.vision import patch_places
from gap_export.runtime.images.image import prepare_image
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import GridSpec
from gap_export.spec.places import lattice_places
from gap_export.spec.recipe import Recipe, find_recipe, load_recipe
from gap_export.spec.requests import PruningRequest
from tests.families.qwen_vl.tiny import (
    TOKEN,
    Tiny,
    stand_in_prompt,
    tower_outputs,
)

# 2 x 6, 6 x 2, 3 x 4 and 4 x 3 tokens.
CANVASES = "48x16,16x48,32x24,24x32"
GRIDS = ((2, 6), (6, 2), (3, 4), (4, 3))
# (width, height) of images, and the number of the canvas that has their aspect.
SIZES = [((97, 30), 0), ((30, 97), 1), ((64, 48), 2), ((48, 64), 3), ((500, 90), 0), ((40, 31), 2)]
ATOL = 1e-5


def noise(size: tuple[int, int]) -> Image.Image:
    return Image.effect_noise(size, 90).convert("RGB")


def recipe_of(tiny: Tiny) -> Recipe:
    return on_canvas(load_recipe(tiny.folder / "recipe.yaml"), CANVASES)


def own_pixels(image: Image.Image, recipe: Recipe, number: int) -> torch.Tensor:
    """[1, 3, h, w] of an image on its own canvas, as a bundle of that canvas alone has it."""
    rows, cols = GRIDS[number]
    alone = on_canvas(recipe, f"{cols * TOKEN}x{rows * TOKEN}")
    assert alone.image.grids == ()
    return torch.from_numpy(prepare_image(image, alone.image)[0])


@pytest.mark.parametrize(("size", "number"), SIZES)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_features_are_those_of_transformers_on_the_canvas_of_the_image_s_aspect(
    tiny_of, family, size, number
):
    tiny = tiny_of(family)
    recipe = recipe_of(tiny)
    assert recipe.image.grids == GRIDS
    image = noise(size)
    pixels, geometry = prepare_image(image, recipe.image)
    assert pixels.shape == (1, 3, 16, 48)
    assert geometry.canvas_number(recipe.image) == number
    assert geometry.token_grid(recipe.image, recipe.grid) == GRIDS[number]
    pruning = resolve_pruning(recipe, PruningRequest(keep_ratio=1.0))
    reference = build_reference(recipe, Checkpoint.of(tiny.folder), pruning, device="cpu")
    main, taps = tower_outputs(tiny, own_pixels(image, recipe, number))
    with torch.inference_mode():
        features, _ = reference.vision_encoder(torch.from_numpy(pixels), torch.tensor([number]))
        others, _ = reference.vision_encoder(torch.from_numpy(pixels), torch.tensor([3 - number]))
    wanted = torch.cat([main, *taps], dim=2)
    assert (features - wanted).abs().max() < ATOL
    assert (others - wanted).abs().max() > 0.1


def test_places_of_the_first_canvas_are_its_own():
    places = patch_places((4, 12), (2, 2), (2, 6))
    assert places.tolist() == [[row, col] for row in range(4) for col in range(12)]
    turned = patch_places((4, 12), (2, 2), (6, 2))
    assert sorted(turned.tolist()) == [[row, col] for row in range(12) for col in range(4)]


@pytest.fixture(scope="module")
def bundle(tiny_of: Callable[[str], Tiny], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("canvases") / "bundle"
    request = PruningRequest(keep_ratio=0.5, pruner="divprune", canvas=CANVASES)
    gap_export.export(tiny_of("qwen3_vl").folder, request, out=out)
    return out


def test_the_graph_is_told_the_canvas_and_has_one_set_of_weights(bundle):
    manifest = open_bundle(bundle).manifest
    vision = manifest.graph("vision_encoder")
    assert [(one.name, one.shape) for one in vision.inputs] == [
        ("pixel_values", ("num_images", 3, 16, 48)), ("canvas", (1,))
    ]  # fmt: skip
    plain = json.loads((bundle / "gap.json").read_text())["image"]
    assert plain["grids"] == [list(grid) for grid in GRIDS]
    assert len(list(bundle.glob("*.onnx"))) == 4


@pytest.mark.parametrize(("size", "number"), SIZES[:4])
def test_answers_are_those_of_a_bundle_of_the_canvas_alone(bundle, tiny_of, size, number):
    """Prompt, ids and answer of PyTorch's model of that canvas, at the same keep ratio."""
    tiny = tiny_of("qwen3_vl")
    rows, cols = GRIDS[number]
    image = noise(size)
    with GroundingSession.open(bundle) as session:
        fed = _feeds(session)
        answer = session.ground(image, "the star")
    assert (answer.tokens[0].rows, answer.tokens[0].cols) == (rows, cols)
    prefix, _ = stand_in_prompt(tiny.folder, "the star")
    keep = np.array(answer.keep_indices)
    start = len(prefix)
    table = fed["kept_positions"][:, 0]
    visual = table[:, start : start + len(keep)]
    assert visual.tolist() == [
        [start] * len(keep), (start + keep // cols).tolist(), (start + keep % cols).tolist()
    ]  # fmt: skip
    assert table[:, start + len(keep)].tolist() == [start + max(rows, cols)] * 3
    main, taps = tower_outputs(tiny, own_pixels(image, recipe_of(tiny), number))
    wanted = torch.cat([main, *taps], dim=2)[0, keep].numpy()
    assert np.abs(fed["inputs_embeds"][0, start : start + len(keep)] - wanted).max() < 1e-4


def _feeds(session: GroundingSession) -> dict[str, Any]:
    """Filled with what the decoder is fed first."""
    fed: dict[str, Any] = {}
    decode = session.backend.decode

    def spy(feed: Any, cache: Any) -> Any:
        for name, value in feed.items():
            fed.setdefault(name, value)
        return decode(feed, cache)

    session.backend.decode = spy  # type: ignore[method-assign]
    return fed


@pytest.mark.parametrize(
    "pruner", ["spatial", pytest.param("fastervlm-received", marks=pytest.mark.full)]
)
def test_places_are_counted_in_the_grid_of_the_image_s_canvas(tiny_of, tmp_path, pruner):
    """An even lattice is one of each canvas, and so is the middle of what is dropped."""
    folder, out = tiny_of("qwen3_vl").folder, tmp_path / "bundle"
    request = PruningRequest(
        keep_ratio=0.3, pruner=pruner, canvas=CANVASES, extra_token="mean",
        extra_position="centroid",
    )  # fmt: skip
    gap_export.export(folder, request, out=out)
    model = onnx.load(out / "vision_encoder.onnx", load_external_data=False)
    assert "GatherND" not in {node.op_type for node in model.graph.node}, "not lowered for TensorRT"
    with GroundingSession.open(out) as session:
        for size, number in SIZES[:4]:
            rows, cols = GRIDS[number]
            *kept, extra = session.ground(noise(size), "the star").keep_indices
            dropped = np.setdiff1d(np.arange(rows * cols), kept)
            row, col = (np.floor(part.mean() + 0.5) for part in np.divmod(dropped, cols))
            assert extra == row * cols + col
            if pruner == "spatial":
                grid = GridSpec(rows=rows, cols=cols)
                assert kept == lattice_places(grid, num_kept_tokens=len(kept)).tolist()


def test_check_compares_images_of_several_canvases(bundle, tmp_path):
    images = []
    for number, (size, _) in enumerate(SIZES[:4]):
        images.append(tmp_path / f"{number}.png")
        noise(size).save(images[-1])
    report = gap_export.check(bundle, samples=1, images=images)
    assert report.passed, [(one.level, one.reason) for one in report.backends[0].levels]


def test_a_golden_holds_the_canvas(bundle, tmp_path):
    image = tmp_path / "high.png"
    noise((30, 97)).save(image)
    golden = gap_export.record(bundle, tmp_path / "golden", samples=1, images=[image])
    assert gap_export.check(bundle, against=golden).passed


def test_boxes_come_back_in_pixels_of_the_image(bundle, monkeypatch):
    with GroundingSession.open(bundle) as session:
        monkeypatch.setattr(session._prompts, "decode", lambda _: "[100, 200, 500, 1000]")
        for size, _ in SIZES[:4]:
            box = session.ground(noise(size), "the star").box
            width, height = size
            assert box == pytest.approx((width * 0.1, height * 0.2, width * 0.5, height))


@pytest.mark.parametrize(
    ("name", "canvas", "why"),
    [
        (
            "qwen3-vl-2b",
            "640x480,480x608",
            "as many visual tokens each: 640x480: 300, 480x608: 285",
        ),
        ("qwen3-vl-2b", "640x480,", "width x height in pixels"),
        ("qwen2.5-vl-3b", "644x476,476x644", "takes one canvas a bundle: its windows"),
        ("demo", "96x96,48x192", "sees images of one size"),
    ],
)
def test_canvases_that_do_not_go_together_are_refused(name, canvas, why):
    with pytest.raises(UsageError, match=why):
        on_canvas(find_recipe(name)[0], canvas)


def test_the_same_canvas_twice_is_one():
    recipe = find_recipe("qwen3-vl-2b")[0]
    assert on_canvas(recipe, "640x480,640x480") == recipe
    both = on_canvas(recipe, "640x480,480x640")
    assert both.image.grids == ((15, 20), (20, 15))
    assert on_canvas(both, "640x480") == recipe


def test_a_folder_whose_tower_has_windows_takes_one_canvas(tiny_of, tmp_path):
    request = PruningRequest(canvas="40x24,24x40")
    with pytest.raises(CheckpointError, match=r"windows.*3x5 tokens, 5x3 tokens; export a b"):
        gap_export.export(tiny_of("qwen2_5_vl").folder, request, out=tmp_path / "bundle")


def test_inspect_names_the_grid_of_every_canvas(bundle, capsys):
    assert main(["inspect", str(bundle)]) == 0
    assert "6 of 12 visual tokens, 2x6 or 6x2 or 3x4 or 4x3 grid" in capsys.readouterr().out


def test_a_canvas_that_leaves_no_room_for_a_prompt_is_refused_as_one(tiny_of, tmp_path):
    request = PruningRequest(canvas="4096x8")
    with pytest.raises(CheckpointError, match=r"does not fit.*context.*choose a smaller canvas"):
        gap_export.export(tiny_of("qwen2_vl").folder, request, out=tmp_path / "bundle")


def test_a_baseline_of_another_canvas_is_refused_with_the_option_that_makes_one(bundle):
    manifest = open_bundle(bundle).manifest
    alone = replace(manifest, image=replace(manifest.image, grids=()))
    with pytest.raises(UsageError, match=f"--keep 1 --canvas {CANVASES}"):
        check_baseline(manifest, alone)
