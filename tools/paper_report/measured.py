"""What tools/paper_table.py measured of one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gap_export.recipe import Recipe

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One model's results.

    Attributes:
        recipe: What it is.
        report: JSON form of the evaluation with fixed shares.
        adaptive: The same with budgets that each picture decides; None where no pruner has one.
    """

    recipe: Recipe
    report: Row
    adaptive: Row | None

    def rows(self) -> list[Row]:
        """All rows, each with its ``budget``."""
        rows = [{**row, "budget": "fixed"} for row in self.report["rows"]]
        if self.adaptive is not None:
            pruned = (r for r in self.adaptive["rows"] if r["positions"] in ("compact", "gap"))
            rows += [{**row, "budget": "adaptive"} for row in pruned]
        return rows
