"""Errors of tensors as SVG, on a logarithmic scale beside their tolerances.

Colours are of the palette of Okabe and Ito (2008), which colour-blind people tell apart; verdicts
have shapes of their own as well.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gap_export.parity.results import TensorRow
from gap_export.visible import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, VERMILLION, INK, GRID = "#0072B2", "#D55E00", "#222222", "#dddddd"
# Inches.
_WIDTH, _ROW, _FRAME = 11.5, 0.24, 1.35
_PIXELS_PER_POINT = 96 / 72
# Of its width, that a figure shrinks to where there is less room: letters stay legible.
_SMALLEST = 0.62
# Beyond this many tensors a picture tells no more than its table.
_MAX_ROWS = 500
_MAX_LABEL = 56
# Decades that an error is shown in, below the largest value there is.
_MAX_DECADES = 14
STYLE: dict[Any, Any] = {
    # Text as outlines looks the same everywhere; ids come from contents, not from a random number.
    "svg.fonttype": "path",
    "svg.hashsalt": "gap-export",
    "font.size": 10,
    "axes.edgecolor": "#888888",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw_errors(rows: Sequence[TensorRow], *, mark: str) -> str:
    """A row for each tensor, from top to bottom: its errors, and how large they may be.

    Args:
        rows: At least one, in the order they are computed in.
        mark: Begins the ids within the picture, so that several fit into one page.

    Returns:
        An ``<svg>`` element without declaration; what it holds of names is outlines of letters.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = rows[:_MAX_ROWS]
    with rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, _FRAME + _ROW * len(rows)), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        low, high = _limits(rows)
        _draw_rows(axes, rows, low, high)
        axes.set_xlim(low, high * 2)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        at_the_right = "" if _is_finite(rows) else ", at the right edge: not finite"
        axes.set_xlabel(f"|reference - candidate|, logarithmic; at the left edge: 0{at_the_right}")
        axes.set_yticks(range(len(rows)))
        for label, row in zip(axes.set_yticklabels(map(_label, rows)), rows, strict=True):
            # A name may hold dollar signs, which are no formula.
            label.set_parse_math(False)
            label.set_color(INK if row.passed else VERMILLION)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        figure.legend(loc="outside upper center", ncols=5, frameon=False)
        return to_svg(figure, mark=mark)


def to_svg(figure: Figure, *, mark: str) -> str:
    """A figure as an ``<svg>`` element without declaration, to be called within :data:`STYLE`.

    Args:
        figure: Has a canvas of SVG.
        mark: Begins the ids within the picture, so that several fit into one page.
    """
    stream = io.StringIO()
    figure.savefig(
        stream,
        format="svg",
        # The page shows beside it, where it does not fit, that there is more to the right.
        transparent=True,
        metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
    )
    return _embeddable(stream.getvalue(), mark)


def drawable(text: str) -> str:
    """Text of letters that a picture's font has, in one line."""
    return " ".join(clean(text).encode("ascii", "backslashreplace").decode().split())


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


def tolerated(row: TensorRow) -> float:
    """The largest difference that passes: that of the largest value."""
    return row.atol + row.rtol * row.max_abs_reference


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


def _label(row: TensorRow) -> str:
    """Module or graph, and name, of letters that the picture's font has; the end is kept."""
    owner = row.module or row.component
    name = drawable(f"{owner}: {row.tensor}")
    return name if len(name) <= _MAX_LABEL else f"...{name[3 - _MAX_LABEL :]}"


def _embeddable(svg: str, mark: str) -> str:
    """The element alone, with ids of its own, and not larger than it was drawn to be."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    # Names of tensors; they are in the picture, and in the table below it.
    element = re.sub(r"<!--.*?-->", "", element, flags=re.DOTALL)
    element = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{mark}-", element)
    return re.sub(
        r'^<svg([^>]*?) width="([0-9.]+)pt" height="[^"]*"',
        _sized,
        element,
        count=1,
        flags=re.DOTALL,
    )


def _sized(tag: re.Match[str]) -> str:
    width = float(tag[2]) * _PIXELS_PER_POINT
    style = f"max-width:{width:.0f}px;min-width:{_SMALLEST * width:.0f}px"
    return f'<svg{tag[1]} role="img" style="{style}"'
