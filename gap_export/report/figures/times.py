"""Milliseconds of an answer, stage upon stage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gap_export.benchmark.results import STAGES, BenchRow
from gap_export.report.figures import (
    BLUE,
    GREEN,
    GRID,
    INK,
    ORANGE,
    PURPLE,
    VERMILLION,
    WIDTH,
    draw_svg,
    drawable,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches.
_ROW, _FRAME = 0.42, 1.3
_MAX_ROWS, _MAX_NAME = 40, 40
_COLORS = dict(zip(STAGES, (INK, PURPLE, GREEN, ORANGE, BLUE, VERMILLION), strict=True))
# Color-blind people, and printers, tell them apart by these.
_HATCHES = dict(zip(STAGES, ("", "..", "", "xx", "", "//"), strict=True))


def draw_times(rows: Sequence[BenchRow], mark: str) -> str:
    """Draw a bar for each row, of a part for each stage.

    Args:
        rows: At least one.
        mark: See :func:`gap_export.report.figures.draw_svg`.
    """
    rows = rows[:_MAX_ROWS]
    present = [name for name in STAGES if any(name in row.stages for row in rows)]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        start = [0.0] * len(rows)
        for name in present:
            widths = [row.stages[name].median if name in row.stages else 0.0 for row in rows]
            axes.barh(
                range(len(rows)),
                widths,
                left=start,
                height=0.6,
                color=_COLORS[name],
                hatch=_HATCHES[name],
                edgecolor="white",
                linewidth=0.5,
                label=STAGES[name],
            )
            start = [at + width for at, width in zip(start, widths, strict=True)]
        names = [drawable(row.name) for row in rows]
        axes.set_yticks(range(len(rows)), [name[-_MAX_NAME:] for name in names])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel("ms, medians")
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        figure.legend(loc="outside upper center", ncols=len(present), frameon=False)

    return draw_svg(draw, size=(WIDTH, _FRAME + _ROW * len(rows)), mark=mark)
