"""Faults of tiles and of joined patches are found, each at its level."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.exporting import ExportOptions, export_model
from gap_export.parity import check as check_module
from gap_export.parity.inside.look import Inside
from gap_export.parity.question import Question
from gap_export.parity.results import LEVELS
from gap_export.runtime import visual_tokens
from gap_export.spec.recipe import load_recipe
from gap_export.spec.requests import PruningRequest
from gap_export.spec.tiles import TiledTokens, TileStack, stack_tiles
from tests.families.tiny_internvl import write_internvl
from tests.parity.checking import check_with_torch, level_of, statuses
from tests.parity.tile_mutants import TILE_MUTANTS


def questions() -> list[Question]:
    """Of 3 x 2 and 1 x 2 tiles, and of one."""
    rng = np.random.default_rng(0)
    return [
        Question(image=rng.integers(0, 255, size).astype(np.uint8), expression="the lady")
        for size in ((60, 40, 3), (30, 64, 3), (40, 40, 3))
    ]


@pytest.fixture(autouse=True)
def _without_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_module, "look_inside", lambda *_, **__: Inside())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny InternVL and a bundle of it. Read only."""
    folder = tmp_path_factory.mktemp("tiles")
    write_internvl(folder / "checkpoint", decoder="qwen3", form="original")
    request = PruningRequest(pruner="spatial", keep_ratio=0.3)
    export_model(
        ExportOptions(model=str(folder / "checkpoint"), pruning=request, out=folder / "bundle")
    )
    return folder / "checkpoint", folder / "bundle"


def check(bundle: Path, checkpoint: Path, levels: Any) -> Any:
    recipe = load_recipe(checkpoint / "recipe.yaml")
    return check_with_torch(bundle, recipe, Checkpoint.of(checkpoint), questions(), levels=levels)


def test_an_untouched_bundle_passes(made: tuple[Path, Path]):
    checkpoint, bundle = made
    report = check(bundle, checkpoint, ["positions", "tensor", "token"])
    assert set(statuses(report).values()) == {"passed"}


@pytest.mark.parametrize("name", TILE_MUTANTS)
def test_a_fault_is_caught_at_its_level(made: tuple[Path, Path], tmp_path: Path, name: str):
    checkpoint, honest = made
    mutant, level = TILE_MUTANTS[name]
    levels = LEVELS[: LEVELS.index(level) + 1]
    report = check(mutant(honest, tmp_path / "mutant"), checkpoint, levels)
    found = statuses(report)
    assert found[level] == "failed"
    assert [found[other] for other in levels[:-1]] == ["passed"] * (len(levels) - 1)


def thumbnail_s_tokens_first(tokens: TiledTokens, per_tile: int) -> dict[str, Any]:
    del per_tile
    few = tokens.tiles[0].num_kept_tokens
    return {"source": np.roll(tokens.source, few)}


def ids_of_the_tile_behind(tokens: TiledTokens, per_tile: int) -> dict[str, Any]:
    moved = tokens.keep_indices + per_tile
    return {"keep_indices": np.minimum(moved, np.arange(-len(moved), 0) + tokens.num_visual_tokens)}


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (thumbnail_s_tokens_first, "do not follow each other as the tiles do"),
        (
            ids_of_the_tile_behind,
            r"said to be \[21, 23, 28, 30, 31\], tile by tile \[5, 7, 12, 14, 15\]",
        ),
    ],
)
def test_order_that_a_session_gets_wrong_is_caught_by_walking_through_the_tiles(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, fault: Any, says: str
):
    """PyTorch is asked by the same session, so it is wrong alike."""
    checkpoint, bundle = made

    def wrong(keep_indices: Any, stack: TileStack) -> TiledTokens:
        tokens = stack_tiles(keep_indices, stack)
        return replace(tokens, **fault(tokens, stack.rows * stack.cols))

    monkeypatch.setattr(visual_tokens, "stack_tiles", wrong)
    report = check(bundle, checkpoint, ["positions", "tensor"])
    assert statuses(report) == {"positions": "failed", "tensor": "passed"}
    assert re.search(says, level_of(report, "positions").reason)
