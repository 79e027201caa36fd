"""Faults of three position axes and of DeepStack are found, each at its level."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.exporting import ExportOptions, export_model
from gap_export.parity import check as check_module
from gap_export.parity.inside.look import Inside, look_inside
from gap_export.parity.inside.positions_seen import read_positions
from gap_export.parity.question import Question
from gap_export.parity.results import LEVELS, Level
from gap_export.runtime.session import GroundingSession
from gap_export.spec.recipe import Recipe, load_recipe
from gap_export.spec.requests import EnginesRequest, PruningRequest
from tests.families.qwen_vl.tiny import CANVASES, make_tiny
from tests.parity.checking import check_with_torch, level_of, statuses
from tests.parity.mrope_mutants import (
    AXES_MUTANTS,
    TAPS_MUTANTS,
    columns_zeroed,
    decode_by_unpruned_delta,
    frequencies_of_columns_turn_by_rows,
    rows_and_columns_exchanged,
)

DECODER = "decoder_model_merged"


class Made(NamedTuple):
    """A tiny checkpoint and a bundle of it, read only."""

    bundle: Path
    recipe: Recipe
    checkpoint: Checkpoint

    def check(self, bundle: Path, *levels: Level, **more: Any) -> Any:
        """Two questions to PyTorch and to a bundle of this checkpoint."""
        return check_with_torch(
            bundle, self.recipe, self.checkpoint, QUESTIONS, levels=levels, **more
        )


def questions() -> list[Question]:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (40, 60, 3)).astype(np.uint8)
    return [Question(image=image, expression=text) for text in ("star", "a small circle")]


QUESTIONS = questions()


def make(folder: Path, family: str, *, theta: float | None = None, **options: Any) -> Made:
    tiny = make_tiny(family, folder / "checkpoint", canvas=CANVASES["rows > cols"])
    if theta is not None:
        config = json.loads((tiny.folder / "config.json").read_text())
        (tiny.folder / "config.json").write_text(json.dumps({**config, "rope_theta": theta}))
    # Two tokens of 7 x 3, none in the last row.
    request = PruningRequest(pruner="spatial", keep_ratio=0.1)
    out = folder / "bundle"
    export_model(ExportOptions(model=str(tiny.folder), pruning=request, out=out, **options))
    recipe = load_recipe(tiny.folder / "recipe.yaml")
    return Made(out, recipe, Checkpoint.of(tiny.folder))


@pytest.fixture(autouse=True)
def _without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "look_inside", lambda *_, **__: Inside())


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Axes take turns in the frequencies; two taps."""
    return make(tmp_path_factory.mktemp("qwen3"), "qwen3_vl")


@pytest.fixture(scope="module")
def qwen2_5(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Each axis has a run of frequencies, in float16, in all forms that TensorRT builds."""
    return make(
        tmp_path_factory.mktemp("qwen2_5"),
        "qwen2_5_vl",
        # As published: frequencies of columns are the lowest.
        theta=1e6,
        dtype="float16",
        engines=EnginesRequest(targets=("orin",), lowering="fused"),
    )


def test_an_untouched_bundle_passes(qwen3):
    report = qwen3.check(qwen3.bundle, "positions", "tensor", "token")
    assert set(statuses(report).values()) == {"passed"}


def test_layers_are_compared_with_their_taps(qwen3, monkeypatch):
    monkeypatch.setattr(check_module, "look_inside", look_inside)
    rows = level_of(qwen3.check(qwen3.bundle, "tensor", per_layer=True), "tensor").rows
    components = {"vision_encoder", "embed_tokens", DECODER}
    assert {row.component for row in rows if row.module} == components
    assert all(row.passed for row in rows)


@pytest.mark.parametrize("name", AXES_MUTANTS)
def test_wrong_ids_are_found_by_reading_them(qwen3, tmp_path, name):
    mutant, level = AXES_MUTANTS[name]
    assert level == "positions"
    rows = read_positions(open_bundle(mutant(qwen3.bundle, tmp_path / "mutant")))
    wrong = [row.call for row in rows if not row.passed]
    prefill, decode = ["prefill"], ["decode 1", "decode 2", "decode 50"]
    # Tokens of an answer have one id on all axes.
    assert wrong == {
        rows_and_columns_exchanged: prefill,
        decode_by_unpruned_delta: decode,
    }.get(mutant, prefill + decode)


@pytest.mark.parametrize("name", TAPS_MUTANTS)
def test_wrong_taps_are_found_in_tensors(qwen3, tmp_path, name):
    mutant, level = TAPS_MUTANTS[name]
    report = qwen3.check(mutant(qwen3.bundle, tmp_path / "mutant"), "positions", level)
    assert statuses(report) == {"positions": "passed", level: "failed"}


def test_a_session_that_shifts_text_is_found_though_both_sides_are_fed_alike(qwen3, monkeypatch):
    init = GroundingSession.__init__

    def shifting(self, *given, **more):
        init(self, *given, **more)
        self.positions = "text-shifted"

    monkeypatch.setattr(GroundingSession, "__init__", shifting)
    report = qwen3.check(qwen3.bundle, "positions", "tensor")
    assert statuses(report) == {"positions": "failed", "tensor": "passed"}
    assert "counted by hand" in level_of(report, "positions").reason


@pytest.mark.full
@pytest.mark.parametrize("name", AXES_MUTANTS)
def test_a_fault_is_caught_at_its_level_with_chunked_frequencies(qwen2_5, tmp_path, name):
    mutant, level = AXES_MUTANTS[name]
    report = qwen2_5.check(mutant(qwen2_5.bundle, tmp_path / "mutant"), level)
    assert statuses(report) == {level: "failed"}


@pytest.mark.full
@pytest.mark.parametrize("mutant", [columns_zeroed, frequencies_of_columns_turn_by_rows])
def test_wrong_columns_are_seen_by_no_logit(qwen2_5, tmp_path, mutant):
    report = qwen2_5.check(mutant(qwen2_5.bundle, tmp_path / "mutant"), *LEVELS[:3])
    assert statuses(report) == {"positions": "failed", "tensor": "passed", "token": "passed"}


@pytest.mark.full
def test_every_form_of_the_decoder_is_read(qwen2_5):
    bundle = open_bundle(qwen2_5.bundle)
    files = {g.lowering: g.file for g in bundle.manifest.graphs if g.component == DECODER}
    assert set(files) == {"onnxruntime", "ort", "fused"}
    layers = bundle.manifest.decoder.num_layers
    for lowering, file in files.items():
        rows = read_positions(bundle, file=file)
        # Of ONNX Runtime's own form each rotation says by itself which rows it takes.
        readers = 2 + 2 * layers if lowering == "ort" else 2
        assert {row.readers for row in rows} == {readers} and all(row.passed for row in rows)
