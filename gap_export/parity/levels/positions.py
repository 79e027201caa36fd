"""Level ``positions``: RoPE sees the ids that tokens had before pruning."""

from __future__ import annotations

from collections.abc import Sequence

from gap_export.bundle import Bundle
from gap_export.parity.inside.positions_seen import PositionsNotRead, read_positions
from gap_export.parity.results import LevelResult
from gap_export.spec.positions import Int64Array


def judge_positions(
    bundle: Bundle,
    decoder_graph: str,
    *,
    tables: Sequence[Int64Array] = (),
    wrong_fed: str = "",
    note: str = "",
) -> LevelResult:
    """The ids that a decoder turns into angles are those there must be.

    Args:
        bundle: Whose decoder it is.
        decoder_graph: Which of its graphs, by its file.
        tables: int64 [B, P] or [A, B, P] each: ids of prompts that the reference was asked with.
        wrong_fed: What is wrong with these ids already; see :mod:`.fed_ids`.
        note: What should be known of the graph.
    """
    found = read_positions(bundle, file=decoder_graph, tables=tables)
    if isinstance(found, PositionsNotRead):
        return LevelResult(
            level="positions",
            status="failed" if wrong_fed else "not_run",
            reason="; ".join(filter(None, (wrong_fed, found.reason))),
        )
    figures: dict[str, float | int | None] = {
        "calls": len(found),
        "readers": max(row.readers for row in found),
    }
    if bundle.manifest.decoder.position_axes > 1:
        figures["axes"] = bundle.manifest.decoder.position_axes
    failed = [row for row in found if not row.passed]
    reasons = [f"{row.call}: {row.reason}" for row in failed[:1]]
    if wrong_fed:
        reasons.insert(0, wrong_fed)
    if len(failed) > 1:
        reasons.append(f"wrong as well: {', '.join(row.call for row in failed[1:])}")
    return LevelResult(
        level="positions",
        status="failed" if reasons else "passed",
        reason="; ".join(filter(None, (*reasons, note))),
        figures=figures,
        rows=found,
    )
