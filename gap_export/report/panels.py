"""Rows of an evaluation, arranged the way tables and figures show them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gap_export.evaluation.results import SettingRow
from gap_export.evaluation.settings import SettingPositions

_TOTAL = "total"
# Stages before the first token of an answer, texts aside.
BEGINNING = ("vision_encoder", "prefill")
SMALLER_IMAGE: SettingPositions = "smaller-image"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Settings that are shown side by side: the unpruned one and what was made of it.

    Attributes:
        title: What they have in common: pruner and keep ratio, or that nothing is dropped.
        rows: The unpruned one first, where there is one.
    """

    title: str
    rows: tuple[SettingRow, ...]


def panels_of(rows: Sequence[SettingRow]) -> tuple[Panel, ...]:
    """A panel for each pruner at each keep ratio, then one for the settings that drop nothing.

    Beside a pruner stands the smaller image of nearest number of tokens, where there is one.
    """
    unpruned = [row for row in rows if row.positions == "none"]
    groups: dict[str, list[SettingRow]] = {}
    for row in rows:
        if row.pruner != "none":
            reads = " (reads the question)" if row.pruner_text == "question" else ""
            groups.setdefault(f"{row.pruner} keep {row.keep_ratio:g}{reads}", []).append(row)
    smaller = [row for row in rows if row.positions == SMALLER_IMAGE]
    for members in groups.values():
        tokens = members[-1].mean_visual_tokens
        nearest = sorted(smaller, key=lambda row: abs(row.mean_visual_tokens - tokens))
        members.extend(nearest[:1])
    plain = ("none", SMALLER_IMAGE)
    misaligned = [row for row in rows if row.pruner == "none" and row.positions not in plain]
    if misaligned:
        groups["no token dropped"] = misaligned
    if not groups:
        groups["unpruned"] = []
    return tuple(
        Panel(title=title, rows=(*unpruned, *members)) for title, members in groups.items()
    )


def names_of(tables: Iterable[Mapping[str, object]]) -> tuple[str, ...]:
    """Keys of all of them, each once, in the order they come in."""
    return tuple(dict.fromkeys(name for table in tables for name in table))


def stages_of(rows: Sequence[SettingRow]) -> tuple[str, ...]:
    """Stages that were timed, the total last."""
    names = names_of(row.latency_ms for row in rows)
    return tuple(sorted(names, key=lambda name: name == _TOTAL))
