"""Level ``tensor``: every output of every graph, on the inputs that the reference had."""

from __future__ import annotations

from collections.abc import Sequence

from gap_export.parity.results import LevelResult, TensorRow


def judge_tensors(rows: Sequence[TensorRow], *, broken: str = "", note: str = "") -> LevelResult:
    """Outputs are within the tolerance of their dtype.

    Args:
        rows: One for each output, and for each layer that was asked for. Rows of layers, which
            have a module, only inform: what they add up to is held to its tolerance at the outputs.
        broken: What else is wrong: that the candidate could not be run to the end.
        note: What should be known where something failed.
    """
    outputs = [row for row in rows if not row.module]
    failed = [row for row in outputs if not row.passed]
    reasons = [f"{row.component} {row.tensor}: {row.reason}" for row in failed]
    if broken:
        reasons.insert(0, broken)
    if reasons and note:
        reasons.append(note)
    figures: dict[str, float | int | None] = {
        "outputs": len(outputs),
        "failed": len(failed),
        "calls": sum(row.calls for row in outputs),
    }
    ties = sum(row.ties for row in outputs)
    if ties:
        figures["ties"] = ties
    if len(outputs) < len(rows):
        layers = [row for row in rows if row.module]
        figures |= {"layers": len(layers), "layers_off": sum(not row.passed for row in layers)}
    return LevelResult(
        level="tensor",
        status="failed" if reasons else "passed",
        reason="; ".join(reasons),
        figures=figures,
        rows=tuple(rows),
    )
