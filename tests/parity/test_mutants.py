"""The check is itself checked: each fault is found at its level, and none where there is none."""

from __future__ import annotations

import numpy as np
import pytest

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.parity import check as check_module
from gap_export.parity.inside.look import Inside
from gap_export.parity.question import Question
from gap_export.parity.results import LEVELS
from tests.parity.checking import check_with_torch, statuses
from tests.parity.mutants import (
    MUTANTS,
    activations_overflow,
    checkpoint_with_long_context,
    with_long_context,
)

EXPRESSIONS = ("the star", "a small red circle", "the big object left of a square")


@pytest.fixture(autouse=True)
def _without_a_search(monkeypatch):
    # Where a difference begins is looked for, and tested, elsewhere.
    monkeypatch.setattr(check_module, "look_inside", lambda *_, **__: Inside())


def questions(seed: int) -> list[Question]:
    rng = np.random.default_rng(seed)
    return [
        Question(image=rng.integers(0, 255, (40, 40, 3)).astype(np.uint8), expression=text)
        for text in EXPRESSIONS
    ]


@pytest.fixture(scope="module")
def with_room(tiny_bundle, tiny_checkpoint, tmp_path_factory):
    """A bundle and its checkpoint, with room for ids far beyond the prompt's."""
    folder = tmp_path_factory.mktemp("long")
    bundle = with_long_context(tiny_bundle, folder / "bundle")
    return bundle, checkpoint_with_long_context(tiny_checkpoint, folder / "checkpoint")


@pytest.mark.parametrize("name", [name for name in MUTANTS if name != "fp16 overflow"])
def test_a_fault_is_caught_at_its_level(with_room, tiny_recipe, tmp_path, name):
    honest, checkpoint = with_room
    mutant, level = MUTANTS[name]
    bundle = mutant(honest, tmp_path / "mutant")
    levels = LEVELS[: LEVELS.index(level) + 1]
    report = check_with_torch(
        bundle, tiny_recipe, Checkpoint.of(checkpoint), questions(0), levels=levels
    )
    found = statuses(report)
    assert found[level] == "failed"
    assert not report.passed
    # Nothing before it: the level that is stated is the first.
    assert [found[other] for other in levels[:-1]] == ["passed"] * (len(levels) - 1)


def test_an_overflow_in_float16_is_caught_as_a_tensor(
    exports, tiny_recipe, tiny_checkpoint, tmp_path
):
    honest = exports.bundle(
        model=str(tiny_checkpoint), pruner="spatial", keep_ratio=0.3, dtype="float16"
    )
    bundle = activations_overflow(honest, tmp_path / "mutant")
    checkpoint = Checkpoint.of(tiny_checkpoint)
    report = check_with_torch(bundle, tiny_recipe, checkpoint, questions(0), levels=["tensor"])
    assert statuses(report) == {"tensor": "failed"}


@pytest.mark.parametrize("seed", range(5))
def test_an_untouched_bundle_passes(tiny_bundle, tiny_recipe, tiny_checkpoint, seed):
    checkpoint = Checkpoint.of(tiny_checkpoint)
    report = check_with_torch(tiny_bundle, tiny_recipe, checkpoint, questions(seed))
    assert report.passed
    assert set(statuses(report).values()) <= {"passed", "not_run"}
