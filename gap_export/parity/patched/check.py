"""Check a bundle made by ``gap-export patch``: against the export it was patched from."""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import isnan
from pathlib import Path

from gap_export.bundle import Bundle
from gap_export.errors import UsageError
from gap_export.parity.levels.positions import judge_positions
from gap_export.parity.levels.tensor import judge_tensors
from gap_export.parity.patched.masked_oracle import MaskedOracleReport, compare_with_unpatched
from gap_export.parity.patched.unpatched import find_export
from gap_export.parity.question import Question
from gap_export.parity.results import (
    LEVELS,
    BackendKey,
    BackendResult,
    CheckReport,
    Level,
    LevelResult,
    PositionsRow,
)
from gap_export.progress import Progress
from gap_export.runtime.backends.backend import DECODER
from gap_export.spec.manifest import Manifest

_ONNX_RUNTIME_ALONE = "both sides of the comparison with unpatched graphs run in ONNX Runtime"
_ORACLE_ALONE = (
    "unpruned, the export answers something else; the tensors of its run with the dropped tokens "
    "masked out are what there is to compare with"
)


def was_patched(manifest: Manifest) -> bool:
    """Whether a bundle was made of an ONNX export, and not of a checkpoint."""
    return find_export(manifest) is not None


def check_patched(
    bundle: Bundle,
    original: Path,
    questions: Sequence[Question],
    *,
    backends: Sequence[BackendKey] = ("ort",),
    levels: Sequence[Level] = LEVELS,
    required: Sequence[BackendKey] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> CheckReport:
    """Compare logits with those of the unpruned export, dropped tokens masked out.

    Args:
        bundle: From :func:`gap_export.engines.folder.open_whole`.
        original: The export's folder.
        questions: At least one.
        backends: Those that are not ONNX Runtime are not run.
        levels: Those that are not ``tensor`` are not run.
        required: Backends that must have been run.
        seed: Seed of the samples among the questions.
        progress: Progress reporter.

    Raises:
        UsageError: see :func:`compare_with_unpatched`; or there is nothing to compare.
    """
    started = time.perf_counter()
    wanted = tuple(dict.fromkeys([*backends, *required]))
    if "tensor" not in levels or "ort" not in wanted:
        raise UsageError(
            "a patched bundle is compared with its export at the level tensor, in ONNX Runtime",
            seen=f"levels {', '.join(levels)}; backends {', '.join(wanted)}",
            fix="leave out --level and --backend",
        )
    found = compare_with_unpatched(
        bundle,
        original,
        [question.image for question in questions],
        [question.expression for question in questions],
        progress=progress,
    )
    seconds = time.perf_counter() - started
    pruning = bundle.manifest.pruning
    return CheckReport(
        bundle=str(bundle.path),
        model=bundle.manifest.model.name,
        pruner=pruning.pruner,
        keep_ratio=pruning.keep_ratio,
        reference=found.reference,
        questions=len(questions),
        seed=seed,
        backends=tuple(
            BackendResult(
                backend=key,
                name=found.candidate if key == "ort" else "",
                seconds=seconds if key == "ort" else 0.0,
                levels=tuple(
                    _judge(level, key, found, bundle) for level in LEVELS if level in levels
                ),
            )
            for key in wanted
        ),
        required=tuple(dict.fromkeys(required)),
    )


def _judge(level: Level, key: BackendKey, found: MaskedOracleReport, bundle: Bundle) -> LevelResult:
    if key != "ort":
        return LevelResult(level=level, status="not_run", reason=_ONNX_RUNTIME_ALONE)
    if level == "positions" and bundle.manifest.decoder.position_axes > 1:
        return _judge_axes(bundle)
    if level != "tensor":
        return LevelResult(level=level, status="not_run", reason=_ORACLE_ALONE)
    blind = "" if found.is_sensitive else "re-numbered position ids would not have been noticed"
    return judge_tensors(found.outputs, broken=blind)


def _judge_axes(bundle: Bundle) -> LevelResult:
    """The ids of each axis, which logits may not show; not run where they cannot be read."""
    judged = judge_positions(bundle, bundle.manifest.graph(DECODER).file)
    unread = [row for row in judged.rows if isinstance(row, PositionsRow) and isnan(row.seen[0])]
    if not unread:
        return judged
    return LevelResult(level="positions", status="not_run", reason=unread[0].reason)
