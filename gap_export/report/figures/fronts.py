"""Time against memory of the ways to export a model, and the best of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from gap_export.planning.results import Configuration
from gap_export.report.figures import (
    BLUE,
    GREEN,
    GRID,
    INK,
    PURPLE,
    VERMILLION,
    WIDTH,
    draw_svg,
    drawable,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEIGHT = 4.6
_LOOKS = ((BLUE, "o"), (VERMILLION, "s"), (GREEN, "^"), (PURPLE, "D"))


def draw_front(
    found: Sequence[Configuration], latency_ms: float | None, memory_bytes: float, mark: str
) -> str:
    """Draw each as a point with its range of time; filled where it is on the front.

    Args:
        found: At least one.
        latency_ms: Budget, a line; None for none.
        memory_bytes: Likewise.
        mark: See :func:`gap_export.report.figures.draw_svg`.
    """

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        dtypes = list(dict.fromkeys(one.dtype for one in found))
        for dtype, (color, marker) in zip(dtypes, _LOOKS, strict=False):
            for is_on_front in (True, False):
                some = [one for one in found if (one.dtype, one.on_front) == (dtype, is_on_front)]
                if not some:
                    continue
                times = [one.latency_ms for one in some]
                axes.errorbar(
                    [one.likely for one in times],
                    [one.memory_bytes.high / 1e9 for one in some],
                    xerr=(
                        [one.likely - one.low for one in times],
                        [one.high - one.likely for one in times],
                    ),
                    fmt=marker,
                    color=color,
                    markerfacecolor=color if is_on_front else "white",
                    elinewidth=0.8,
                    label=drawable(dtype) if is_on_front else None,
                )
        for one in found:
            if one.on_front:
                axes.annotate(
                    f"{one.keep_ratio:g}",
                    (one.latency_ms.likely, one.memory_bytes.high / 1e9),
                    textcoords="offset points",
                    xytext=(0, 6),
                    ha="center",
                    fontsize=8,
                )
        axes.axhline(memory_bytes / 1e9, color=INK, linewidth=1, linestyle="--")
        if latency_ms is not None:
            axes.axvline(latency_ms, color=INK, linewidth=1, linestyle="--")
        axes.set_xlabel("ms of an answer, likely, with the range; dashed: budgets")
        axes.set_ylabel("GB at most")
        axes.set_xscale("log")
        axes.set_ylim(bottom=0)
        axes.grid(color=GRID, linewidth=0.8)
        figure.legend(loc="outside upper center", ncols=len(_LOOKS), frameon=False)

    return draw_svg(draw, size=(WIDTH, _HEIGHT), mark=mark)
