#!/usr/bin/env python3
"""How far outputs may be off, and why: the table that `gap-export check` judges by.

tools/tolerance_table.py            print it
tools/tolerance_table.py --write    put it into docs/results
"""

from __future__ import annotations

import typer
from pages import publish

from gap_export.spec.tolerances import TOLERANCES, Tolerance


def main(write: bool = False) -> None:
    """Print a line for the outputs that share a tolerance."""
    lines = ["| dtype | outputs | may be off by | why |", "|---|---|---|---|"]
    for dtype, tolerances in TOLERANCES.items():
        by_tolerance: dict[Tolerance, list[str]] = {}
        for output, tolerance in tolerances.items():
            by_tolerance.setdefault(tolerance, []).append(f"`{output}`")
        for tolerance, outputs in by_tolerance.items():
            lines.append(
                f"| {dtype} | {', '.join(outputs)} | {in_words(tolerance)} | {tolerance.why} |"
            )
    publish("tolerances", "\n".join(["`tools/tolerance_table.py`", "", *lines]), write=write)


def in_words(tolerance: Tolerance) -> str:
    """What it allows."""
    parts = []
    if tolerance.atol or tolerance.rtol:
        parts.append(f"{tolerance.atol:g} + {tolerance.rtol:g} of the value")
    if tolerance.largest_fraction:
        parts.append(f"{100 * tolerance.largest_fraction:.2g} % of the largest value")
    if tolerance.max_changed_fraction:
        parts.append(f"{100 * tolerance.max_changed_fraction:g} % of the tokens, at least one")
    if tolerance.tie_margin:
        parts = parts or ["none"]
        parts.append(
            f"in a tie (tokens chosen one by one, {tolerance.tie_margin:.2g} apart or less) "
            f"{100 * tolerance.max_changed_fraction_in_tie:g} % of the tokens, at least one"
        )
    return "; ".join(parts) or "none"


if __name__ == "__main__":
    typer.run(main)
