"""Checks of small bundles, and what tests look for in their reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.parity.check import check_bundle
from gap_export.parity.question import Question
from gap_export.parity.results import CheckReport, Level, LevelResult, TensorRow
from gap_export.parity.truth import TorchTruth
from gap_export.spec.recipe import Recipe


def check_with_torch(
    bundle: Path,
    recipe: Recipe,
    checkpoint: Checkpoint,
    questions: Sequence[Question],
    **options: Any,
) -> CheckReport:
    """Against PyTorch; options are those of check_bundle."""
    reference = TorchTruth(recipe, checkpoint, questions)
    return check_bundle(open_bundle(bundle, verify="full"), reference=reference, **options)


def run(bundle: Path, reference: Any, **options: Any) -> CheckReport:
    """With any reference; the report can be written as JSON."""
    report = check_bundle(open_bundle(bundle, verify="full"), reference=reference, **options)
    json.dumps(report.to_plain(), allow_nan=False)
    return report


def level_of(report: CheckReport, level: Level, backend: int = 0) -> LevelResult:
    """A level of one backend."""
    (found,) = [one for one in report.backends[backend].levels if one.level == level]
    return found


def statuses(report: CheckReport, backend: int = 0) -> dict[str, str]:
    """By level."""
    return {level.level: level.status for level in report.backends[backend].levels}


def outputs(report: CheckReport) -> list[TensorRow]:
    """Rows of the level tensor, without layers."""
    rows = level_of(report, "tensor").rows
    return [row for row in rows if isinstance(row, TensorRow) and not row.module]


def failed_outputs(report: CheckReport) -> dict[str, str]:
    """Why outputs failed, by name."""
    return {row.tensor: row.reason for row in outputs(report) if not row.passed}
