"""Errors of tensors on a logarithmic scale, beside their tolerances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from gap_export.parity.results import TensorRow
from gap_export.report.figures import BLUE, GRID, INK, VERMILLION, WIDTH, draw_svg, drawable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches.
_ROW, _FRAME = 0.24, 1.35
# Beyond this many tensors a figure tells no more than its table.
_MAX_ROWS = 500
_MAX_LABEL = 56
# Decades that an error is shown in, below the largest value there is.
_MAX_DECADES = 14


def tolerated(row: TensorRow) -> float:
    """The largest difference that passes, which is that of the largest value."""
    return row.atol + row.rtol * row.max_abs_reference


def draw_errors(rows: Sequence[TensorRow], mark: str) -> str:
    """Draw a row for each tensor, from top to bottom: its errors, and how large they may be.

    Args:
        rows: At least one, in the order they are computed in.
        mark: See :func:`gap_export.report.figures.draw_svg`.
    """
    rows = rows[:_MAX_ROWS]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        low, high = _limits(rows)
        _draw_rows(axes, rows, low, high)
        axes.set_xlim(low, high * 2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
        axes.set_ylim(len(rows) - 0.4, -0.6)
        at_the_right = "" if _is_finite(rows) else ", at the right edge: not finite"
        axes.set_xlabel(f"|reference - candidate|, logarithmic; at the left edge: 0{at_the_right}")
        labels = [drawable(f"{row.module or row.component}: {row.tensor}") for row in rows]
        # Of a long name the end is kept.
        shown = [n if len(n) <= _MAX_LABEL else f"...{n[3 - _MAX_LABEL :]}" for n in labels]
        axes.set_yticks(range(len(rows)))
        for label, row in zip(axes.set_yticklabels(shown), rows, strict=True):
            label.set_color(INK if row.passed else VERMILLION)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        figure.legend(loc="outside upper center", ncols=5, frameon=False)

    return draw_svg(draw, size=(WIDTH, _FRAME + _ROW * len(rows)), mark=mark)


def _draw_rows(axes: Axes, rows: Sequence[TensorRow], low: float, high: float) -> None:
    def place(value: float) -> float:
        return high if not math.isfinite(value) else min(max(value, low), high)

    axes.set_xscale("log")
    largest = [place(row.max_abs_diff) for row in rows]
    axes.hlines(range(len(rows)), low, largest, color=GRID, linewidth=2.5)
    for values, marker, label in (
        ([place(row.mean_abs_diff) for row in rows], "s", "mean"),
        ([place(row.p99_abs_diff) for row in rows], "D", "99th percentile"),
    ):
        axes.plot(
            *(values, range(len(rows)), marker),
            color=INK,
            markersize=4.5,
            mfc="white",
            label=label,
            clip_on=False,
        )
    for passed, marker, color, label in (
        (True, "o", BLUE, "largest, within tolerance"),
        (False, "X", VERMILLION, "largest, beyond it"),
    ):
        chosen = [index for index, row in enumerate(rows) if row.passed == passed]
        if chosen:
            values = [largest[index] for index in chosen]
            axes.plot(
                *(values, chosen, marker), color=color, markersize=7, label=label, clip_on=False
            )
    centers, allowed = list(range(len(rows))), [place(tolerated(row)) for row in rows]
    tops, bottoms = [c - 0.5 for c in centers], [c + 0.5 for c in centers]
    axes.vlines(allowed, tops, bottoms, color=INK, linewidth=1.6, label="tolerance")


def _is_finite(rows: Sequence[TensorRow]) -> bool:
    return all(math.isfinite(row.max_abs_diff) for row in rows)


def _limits(rows: Sequence[TensorRow]) -> tuple[float, float]:
    """Where zeros are drawn, below all else; and where what is not finite is, above all else."""
    values = [
        value
        for row in rows
        for value in (row.max_abs_diff, row.mean_abs_diff, row.p99_abs_diff, tolerated(row))
        if math.isfinite(value) and value > 0
    ]
    high = min(max(values, default=1e-3), 1e300)
    low = min(values, default=high / 100) / 4
    if not _is_finite(rows):
        high *= 10
    # One subnormal number must not squeeze all else.
    low = max(min(low, high / 100), high / 10**_MAX_DECADES, 1e-300)
    return low, max(high, 100 * low)
