"""What tools/paper_table.py measured of one model, now or before."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gap_export.pruning import PRESETS, find_preset
from gap_export.report.panels import BEGINNING
from gap_export.spec.recipe import Recipe

Row = dict[str, Any]

COLUMNS = (
    *("model", "protocol", "seed", "pruner", "pruner_text", "budget", "keep_ratio", "positions"),
    *("mean_visual_tokens", "n", "num_images", "acc_at_50", "ci95_low", "ci95_high"),
    *("mean_iou", "parse_failures", "recovered", "gmac", "first_token_ms"),
)
_COUNTS = ("seed", "n", "num_images", "parse_failures")
_NUMBERS = ("keep_ratio", "mean_visual_tokens", "acc_at_50", "mean_iou", "recovered")
# What a setting costs until its answer begins, where that was counted: 10^9 multiply-adds of vision
# encoder and prefill, and their median milliseconds.
_COSTS = ("gmac", "first_token_ms")
# What tells one setting from another.
_WHAT = ("pruner", "pruner_text", "budget", "keep_ratio", "positions")
_KEEPS = (0.5, 0.3, 0.1, 1.0)
_POSITIONS = ("none", "permuted", "shifted", "compact", "text-shifted", "gap", "smaller-image")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model's results.

    Attributes:
        recipe: What it is.
        spec: The data set, as the user named it.
        all_rows: One for each setting, with its ``budget``, and its ``pruner_text`` of a pruner
            that reads the text.
    """

    recipe: Recipe
    spec: str
    all_rows: Sequence[Row]

    def rows(self) -> list[Row]:
        """Rows of pruners as their authors have them, read by all tables but that of the texts.

        What was not measured so yet is as it was measured.
        """
        found: dict[tuple[Any, ...], Row] = {}
        for row in self.all_rows:
            key = _setting({**row, "pruner_text": None})
            if key not in found or row["pruner_text"] == self.text_of(row):
                found[key] = row
        return list(found.values())

    def text_of(self, row: Row) -> str | None:
        """What the pruner of a row reads of the text by default; None of one that reads none."""
        if row["pruner_text"] is None:
            return None
        return "expression" if self.asks_bare else find_preset(row["pruner"]).pruner_text

    @property
    def asks_bare(self) -> bool:
        """Whether the question is the expression itself: what is read of the text is then one."""
        return asks_bare(self.recipe)


def asks_bare(recipe: Recipe) -> bool:
    """Whether a model's question is the expression itself, or is not marked in its prompt."""
    return recipe.prompt.question_template() in {None, "{expression}"}


def with_budget(recipe: Recipe, report: Row, budget: str) -> list[Row]:
    """An evaluation's rows as :class:`Measured` has them."""
    bare = asks_bare(recipe)
    return [
        {
            **row,
            **_costs(row),
            "budget": budget,
            "pruner_text": "expression" if bare and row["pruner_text"] else row["pruner_text"],
        }
        for row in report["rows"]
        if budget == "fixed" or row["positions"] in ("compact", "gap")
    ]


def _costs(row: Row) -> Row:
    if not row.get("multiply_adds"):
        return dict.fromkeys(_COSTS)
    times = [
        row["latency_ms"][stage]["median"] for stage in BEGINNING if stage in row["latency_ms"]
    ]
    return {"gmac": sum(row["multiply_adds"].values()) / 1e9, "first_token_ms": sum(times)}


def rows_of(recipe: Recipe, report: Row) -> list[Row]:
    """Rows of an evaluation that are of a pruner, or stand beside one."""
    (whole,) = (row for row in report["rows"] if row["positions"] == "none")
    found = []
    for row in with_budget(recipe, report, "fixed"):
        if row["positions"] == "smaller-image":
            found.append(row)
        elif row["pruner"] != "none":
            # At keep 1 a fixed budget drops nothing.
            drops = row["mean_visual_tokens"] < whole["mean_visual_tokens"]
            adaptive = row["keep_ratio"] == 1.0 and drops
            found.append({**row, "budget": "adaptive" if adaptive else "fixed"})
    return found


def merge_rows(before: Sequence[Row], now: Sequence[Row]) -> list[Row]:
    """Rows of both, those measured now in place of the same settings' of before, in order."""
    found = {_setting(row): row for row in (*before, *now)}
    return [found[key] for key in sorted(found, key=_place)]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One line a setting; shares 0..1."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            low, high = row["ci95"]
            writer.writerow({**row, "ci95_low": low, "ci95_high": high})


def read_csv(path: Path) -> list[Row]:
    """What :func:`write_csv` wrote; before there was a choice all pruners read the expression."""
    with path.open(newline="", encoding="utf-8") as file:
        return [_parse(line) for line in csv.DictReader(file)]


def _parse(line: dict[str, str]) -> Row:
    row: Row = dict(line)
    row["ci95"] = [float(row.pop("ci95_low")), float(row.pop("ci95_high"))]
    row |= {name: int(line[name]) for name in _COUNTS}
    row |= {name: float(line[name]) if line.get(name) else None for name in (*_NUMBERS, *_COSTS)}
    preset = PRESETS.get(line["pruner"])
    reads = preset is not None and preset.pruner.reads_text
    row["pruner_text"] = (line.get("pruner_text") or "expression") if reads else None
    return row


def _setting(row: Row) -> tuple[Any, ...]:
    # Smaller images differ in their number of tokens alone.
    tokens = row["mean_visual_tokens"] if row["positions"] == "smaller-image" else 0.0
    return (*(row[name] for name in _WHAT), tokens)


def _place(setting: tuple[Any, ...]) -> tuple[Any, ...]:
    pruner, text, budget, keep, positions, tokens = setting
    names = ["none", *PRESETS]
    return (
        budget == "adaptive",
        pruner != "none",
        _KEEPS.index(keep) if pruner != "none" else 0,
        names.index(pruner),
        text or "",
        _POSITIONS.index(positions),
        -tokens,
    )
