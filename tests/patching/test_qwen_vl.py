"""Exports of Qwen2-VL's kind, patched: patches in one list, position ids of three axes."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml

from gap_export.bundle import open_bundle
from gap_export.errors import UsageError
from gap_export.parity.inside.positions_seen import read_positions
from gap_export.parity.patched import masked_oracle
from gap_export.parity.patched.check import check_patched
from gap_export.parity.patched.unpatched import cut_into_patches
from gap_export.parity.question import Question
from gap_export.runtime.session import GroundingSession
from tests.families.qwen_vl.tiny import CANVASES, MERGE, PATCH, patches_of
from tests.parity.mrope_mutants import columns_zeroed
from tests.patching.qwen_exports import build_qwen_export

CANVAS = CANVASES["rows > cols"]
EXPRESSIONS = ("star", "a small circle")
# Two tokens of 7 x 3, none in the last row.
TWO = {"pruner": "spatial", "keep_ratio": 0.1}


@pytest.fixture(
    scope="module", params=["qwen2_vl", pytest.param("qwen2_5_vl", marks=pytest.mark.full)]
)
def export(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only."""
    folder = tmp_path_factory.mktemp(request.param)
    return build_qwen_export(request.param, folder, CANVAS)


@pytest.fixture
def own(export: Path, tmp_path: Path) -> Path:
    """One to be changed."""
    return Path(shutil.copytree(export, tmp_path / "export"))


def edit(file: Path, change: Any) -> None:
    load, dump = (json.loads, json.dumps) if file.suffix == ".json" else (yaml.safe_load, yaml.dump)
    plain = load(file.read_text())
    change(plain)
    file.write_text(dump(plain))


def test_the_pruned_run_equals_the_unpruned_one_with_dropped_tokens_hidden(
    export, patch, images, monkeypatch
):
    bundle = patch(export, **TWO).bundle
    report = masked_oracle.compare_with_unpatched(bundle, export, images, EXPRESSIONS)
    assert report.passed
    worst = {row.tensor: row.max_abs_diff for row in report.outputs}
    assert worst.pop("image_features") == 0 and len(worst) == 3
    assert max(worst.values()) <= 1e-4
    assert report.compact_max_abs_diff > 0.1
    assert all(row.passed for row in read_positions(open_bundle(bundle)))
    # In place of compact ids: text behind the largest id that is left.
    assemble = masked_oracle.assemble_prompt

    def shifted(rows, *, positions, position_axes):
        rule = "text-shifted" if positions == "compact" else positions
        return assemble(rows, positions=rule, position_axes=position_axes)

    monkeypatch.setattr(masked_oracle, "assemble_prompt", shifted)
    report = masked_oracle.compare_with_unpatched(bundle, export, images, EXPRESSIONS)
    assert report.passed and report.compact_max_abs_diff > 0.1


def test_check_reads_the_ids_of_each_axis(export, patch, images, tmp_path):
    bundle = patch(export, **TWO).bundle
    questions = [Question(image=images[0], expression="star")]

    def check(folder: Path) -> dict[str, str]:
        report = check_patched(open_bundle(folder), export, questions)
        return {level.level: level.status for level in report.backends[0].levels}

    assert check(bundle)["positions"] == check(bundle)["tensor"] == "passed"
    assert check(columns_zeroed(bundle, tmp_path / "mutant"))["positions"] == "failed"


def test_a_session_feeds_whole_images_slots_and_ids_of_three_axes(export, patch, images):
    bundle = patch(export, **TWO).bundle
    manifest = open_bundle(bundle).manifest
    (pixels,) = manifest.graph("vision_encoder").inputs
    assert (pixels.name, pixels.shape) == ("pixel_values", (1, 3, *CANVAS))
    shapes = {tensor.name: tensor.shape for tensor in manifest.graph("decoder_model_merged").inputs}
    assert len(shapes["position_ids"]) == 2 and shapes["kept_positions"][0] == 3
    assert manifest.decoder.position_axes == 3
    with GroundingSession.open(bundle) as session:
        both = session.ground_batch(images[0], list(EXPRESSIONS))
        assert both[1].token_ids == session.ground(images[0], EXPRESSIONS[1]).token_ids


def test_another_canvas_is_another_grid_of_the_same_graph(export, patch):
    """Whether a tower takes it lies with who exported it."""
    report = patch(export, pruner="spatial", keep_ratio=0.3, canvas="40x24")
    manifest = report.manifest
    assert (manifest.grid.rows, manifest.grid.cols) == (3, 5)
    (pixels,) = manifest.graph("vision_encoder").inputs
    assert pixels.shape == (1, 3, 24, 40)
    model = onnx.load(report.bundle / "vision_encoder.onnx", load_external_data=False)
    held = {one.name: one for one in model.graph.initializer}
    grid = onnx.numpy_helper.to_array(held["image_grid_thw_of_canvas"])
    assert grid.tolist() == [[1, 24 // PATCH, 40 // PATCH]]
    with pytest.raises(UsageError, match="a multiple of 8, such as 40 or 48"):
        patch(export, canvas="44x24")
    with pytest.raises(UsageError, match="reads one canvas: 3x5 tokens, 5x3 tokens"):
        patch(export, canvas="40x24,24x40")


def test_an_encoder_that_is_not_told_the_grid_is_patched_with_a_warning(own, patch):
    assert patch(own, pruner="spatial", keep_ratio=0.3).warnings == ()
    file = own / "onnx/vision_encoder.onnx"
    model = onnx.load(file)
    (told,) = [one for one in model.graph.input if one.name == "image_grid_thw"]
    model.graph.input.remove(told)
    rows, cols = (side // PATCH for side in CANVAS)
    grid = np.array([[1, rows, cols]])
    model.graph.initializer.append(onnx.numpy_helper.from_array(grid, told.name))
    onnx.save(model, file)
    (said,) = patch(own, pruner="spatial", keep_ratio=0.3).warnings
    assert f"made for one canvas; that this is {CANVAS[1]}x{CANVAS[0]} pixels" in said


def test_patches_are_in_the_order_of_transformers():
    pixels = torch.randn(1, 3, *CANVAS)
    found = cut_into_patches(pixels.numpy(), size=PATCH, frames=2, join=MERGE)
    assert np.array_equal(found["pixel_values"], patches_of(pixels[0]).numpy())
    assert found["image_grid_thw"].tolist() == [[1, CANVAS[0] // PATCH, CANVAS[1] // PATCH]]


def without(key: str, config: dict[str, Any]) -> None:
    del config["vision_config"][key]


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("config.json", partial(without, "spatial_merge_size"), "how an image is cut into patches"),
        (
            "config.json",
            lambda config: config["vision_config"].update(patch_size=2, spatial_merge_size=4),
            r"does not take the patches .*pixel_values .*96.*; allowed: .*\[patches, 24\]",
        ),
        (
            "recipe.yaml",
            lambda recipe: recipe["image"].update(height=64),
            "not one of whole tokens: 24x64 pixels, 7x3 tokens; allowed: 24x56 pixels",
        ),
        ("config.json", lambda config: config.update(model_type="qwen3_5"), "is Qwen3.5, whose"),
        (
            "config.json",
            lambda config: config.update(layer_types=["full_attention", "sliding_attention"]),
            "windows that are counted in slots",
        ),
    ],
)
def test_what_cannot_be_patched_is_refused(own, patch, file, change, message):
    edit(own / file, change)
    with pytest.raises(UsageError, match=message):
        patch(own, **TWO)


def test_features_of_unknown_width_are_refused(own, patch):
    path = own / "onnx/vision_encoder.onnx"
    model = onnx.load(path)
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_param = "width"
    onnx.save(model, path)
    with pytest.raises(UsageError, match="does not give the features of all images in one list"):
        patch(own, **TWO)


def test_a_pruner_that_reads_cls_is_refused(export, patch):
    with pytest.raises(UsageError, match="CLS"):
        patch(export, pruner="cls", keep_ratio=0.3)
