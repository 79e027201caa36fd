"""Plots of tools/paper_table.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gap_export.report.figures import BLUE, GRID, INK, STYLE, VERMILLION
from paper_report.measured import Row

# A README shows 1,400 pixels about half as large: four panels keep their letters legible.
_COLUMNS, _DPI = 4, 150
_COLORS = {"gap": BLUE, "compact": VERMILLION}
_NAMES = {"gap": "GAP", "compact": "compact ids"}
_MARKERS = {"gap": "o", "compact": "s"}


def draw_table(rows: list[Row], path: Path, *, title: str) -> None:
    """One small panel a pruner: Acc@0.5 by share of tokens, with 95 % intervals.

    Args:
        rows: The rows of `Measured.rows`.
        path: A PNG that is written.
        title: The title of the image.
    """
    whole = next(row for row in rows if row["positions"] == "none")
    fixed = [row for row in rows if row["budget"] == "fixed" and row["keep_ratio"] < 1]
    pruners = list(dict.fromkeys(row["pruner"] for row in fixed))
    num_rows = -(-(len(pruners) + 1) // _COLUMNS)
    with rc_context(STYLE):
        figure = Figure(figsize=(2.4 * _COLUMNS, 2.1 * num_rows + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(num_rows, _COLUMNS, sharey=True, squeeze=False).ravel()
        figure.suptitle(
            f"{title}: Acc@0.5 by share of visual tokens kept, n = {whole['n']}", color=INK
        )
        _draw_misaligned(panels[0], rows)
        every_keep = sorted({row["keep_ratio"] for row in fixed})
        for panel, pruner in zip(panels[1:], pruners, strict=False):
            _draw_pruner(panel, [row for row in fixed if row["pruner"] == pruner])
            panel.set_title(pruner, fontsize=10)
            panel.set_xticks(every_keep)
            panel.set_xlabel("share of tokens kept", fontsize=9)
        unpruned = {"color": INK, "linewidth": 0.8, "linestyle": ":", "label": "unpruned"}
        for panel in panels[: len(pruners) + 1]:
            panel.axhline(100 * whole["acc_at_50"], **unpruned)
            panel.set_ylim(-3, 103)
            panel.grid(axis="y", color=GRID, linewidth=0.6)
            panel.set_axisbelow(True)
        for panel in panels[len(pruners) + 1 :]:
            panel.set_visible(False)
        for panel in panels[::_COLUMNS]:
            panel.set_ylabel("Acc@0.5, %")
        handles, labels = panels[1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=_DPI)


def _draw_pruner(panel: Any, rows: list[Row]) -> None:
    for mode in ("gap", "compact"):
        line = sorted((r for r in rows if r["positions"] == mode), key=lambda r: r["keep_ratio"])
        keeps = [row["keep_ratio"] for row in line]
        shares = [100 * row["acc_at_50"] for row in line]
        spread = [
            [s - 100 * row["ci95"][0] for s, row in zip(shares, line, strict=True)],
            [100 * row["ci95"][1] - s for s, row in zip(shares, line, strict=True)],
        ]
        panel.errorbar(
            keeps, shares, yerr=spread, color=_COLORS[mode], marker=_MARKERS[mode],
            markersize=4, linewidth=1.4, capsize=2, label=_NAMES[mode],
        )  # fmt: skip


def _draw_misaligned(panel: Any, rows: list[Row]) -> None:
    """The paper's figure 2(b): nothing dropped, ids alone at fault."""
    chosen = [row for row in rows if row["positions"] in ("none", "permuted", "shifted")]
    names = {"none": "unpruned", "permuted": "permuted", "shifted": "shifted"}
    shares = [100 * row["acc_at_50"] for row in chosen]
    colors = [INK if row["positions"] == "none" else VERMILLION for row in chosen]
    panel.bar([names[row["positions"]] for row in chosen], shares, color=colors, width=0.6)
    for index, share in enumerate(shares):
        fits_above = share < 90
        panel.annotate(
            f"{share:.1f}",
            (index, share + 2 if fits_above else share - 8),
            color=INK if fits_above else "white",
            ha="center",
            fontsize=8,
        )
    panel.set_title("no token dropped", fontsize=10)
    panel.tick_params(axis="x", labelsize=8)
