"""Accuracies, tokens and latencies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gap_export.evaluation.results import Accuracy, SettingRow
from gap_export.evaluation.settings import SettingPositions
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
from gap_export.report.panels import Panel, names_of, stages_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches.
_ROW, _FRAME, _PANEL = 0.3, 1.2, 2.7
# Widths of figures with one, two and three panels side by side, or more.
_WIDTHS = (5.0, 8.0, WIDTH)
# Beyond these a figure tells no more than its table.
_MAX_ROWS, _MAX_PANELS, _MAX_GROUPS, _MAX_STAGES = 100, 12, 8, 12
# As many letters below a panel stand side by side.
_ROOM = 38
_MAX_LABEL, _MAX_NAME = 48, 18
_PRUNER_MARKERS = "osD^v<>Ph*"
# How marks and lines look.
_LOOKS: Mapping[SettingPositions, dict[str, Any]] = MappingProxyType(
    {
        "none": {"color": INK, "marker": "D", "linestyle": "-", "label": "unpruned"},
        "compact": {
            "color": VERMILLION,
            "marker": "s",
            "linestyle": "--",
            "label": "compact positions",
        },
        "text-shifted": {
            "color": ORANGE,
            "marker": "P",
            "linestyle": "--",
            "label": "text-shifted",
        },
        "gap": {"color": BLUE, "marker": "o", "linestyle": "-", "label": "GAP"},
        "gap+proportional": {
            "color": PURPLE,
            "marker": "*",
            "linestyle": "-",
            "label": "GAP, proportional attention",
        },
        "smaller-image": {
            "color": GREEN,
            "marker": "X",
            "linestyle": ":",
            "label": "smaller image",
        },
        "permuted": {"color": PURPLE, "marker": "^", "linestyle": ":", "label": "permuted"},
        "shifted": {"color": GREEN, "marker": "v", "linestyle": "-.", "label": "shifted"},
    }
)


def draw_accuracies(rows: Sequence[SettingRow], mark: str) -> str:
    """Draw Acc@0.5 of each setting with its interval, from top to bottom.

    Args:
        rows: At least one.
        mark: See :func:`gap_export.report.figures.draw_svg`.
    """
    rows = rows[:_MAX_ROWS]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for index, row in enumerate(rows):
            look = {**_LOOKS[row.positions], "markersize": 7, "capsize": 4}
            axes.errorbar([100 * row.acc_at_50], [index], xerr=_errors([row]), **look)
        axes.set_xlim(-2, 102)
        axes.set_xlabel("Acc@0.5 in percent, with its 95 % interval")
        _name_rows(axes, rows)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        _add_legend(figure, rows)

    return draw_svg(draw, size=(WIDTH, _FRAME + _ROW * len(rows)), mark=mark)


def draw_tokens(rows: Sequence[SettingRow], mark: str) -> str:
    """Draw Acc@0.5 by the number of visual tokens the decoder reads: a line for each pruner.

    Args:
        rows: At least one.
        mark: As :func:`draw_accuracies` has it.
    """
    lines: dict[tuple[str, SettingPositions], list[SettingRow]] = {}
    for row in rows[:_MAX_ROWS]:
        lines.setdefault((row.pruner, row.positions), []).append(row)
    pruners = list(dict.fromkeys(pruner for pruner, _ in lines if pruner != "none"))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for (pruner, positions), members in lines.items():
            look = {**_LOOKS[positions], "markersize": 7, "capsize": 3}
            if pruner != "none":
                look["marker"] = _PRUNER_MARKERS[pruners.index(pruner) % len(_PRUNER_MARKERS)]
            if pruner != "none":
                look["label"] = _short(f"{pruner}, {look['label']}")
            ordered = sorted(members, key=lambda row: row.mean_visual_tokens)
            axes.errorbar(
                [row.mean_visual_tokens for row in ordered],
                [100 * row.acc_at_50 for row in ordered],
                yerr=_errors(ordered),
                **look,
            )
        axes.set_xlim(left=0)
        axes.set_ylim(-3, 103)
        axes.set_xlabel("visual tokens the decoder reads, mean")
        axes.set_ylabel("Acc@0.5 in percent")
        axes.grid(color=GRID, linewidth=0.8)
        figure.legend(loc="outside right upper", frameon=False)

    return draw_svg(draw, size=(WIDTH, max(4.0, _FRAME + 0.25 * len(lines))), mark=mark)


def draw_thresholds(panels: Sequence[Panel], mark: str) -> str:
    """Draw the share of hits by threshold of IoU: a panel for each pruner and keep ratio.

    Args:
        panels: At least one.
        mark: As :func:`draw_accuracies` has it.
    """

    def draw(axes: Axes, panel: Panel) -> None:
        for row in panel.rows:
            thresholds, shares = [float(name) for name in row.curve], row.curve.values()
            axes.plot(
                thresholds, [100 * share for share in shares], markersize=5, **_LOOKS[row.positions]
            )
        axes.set_xticks([0.1, 0.3, 0.5, 0.7, 0.9])
        axes.set_xlabel("threshold of IoU")
        axes.set_ylabel("hits in percent")

    return _draw_shares(panels, draw, mark)


def draw_groups(
    panels: Sequence[Panel], groups_of: Callable[[SettingRow], Mapping[str, Accuracy]], mark: str
) -> str:
    """Draw Acc@0.5 with its interval by group of expressions: a panel for each pruner and keep.

    Args:
        panels: At least one.
        groups_of: Accuracies by group, of a row.
        mark: As :func:`draw_accuracies` has it.
    """
    names = names_of(groups_of(row) for panel in panels for row in panel.rows)[:_MAX_GROUPS]
    labels = [_short(name, _MAX_NAME) for name in names]

    def draw(axes: Axes, panel: Panel) -> None:
        for index, row in enumerate(panel.rows):
            # Side by side, around the group's place.
            aside = 0.18 * (index - (len(panel.rows) - 1) / 2)
            groups = groups_of(row)
            places = [place for place, name in enumerate(names) if name in groups]
            found = [groups[names[place]] for place in places]
            look = {**_LOOKS[row.positions], "linestyle": "none", "markersize": 6, "capsize": 3}
            axes.errorbar(
                [place + aside for place in places],
                [100 * one.acc_at_50 for one in found],
                yerr=_errors(found),
                **look,
            )
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_xticks(range(len(names)), labels)
        axes.set_ylabel("Acc@0.5 in percent")
        if sum(map(len, labels)) > _ROOM:
            axes.tick_params(axis="x", labelrotation=20)

    return _draw_shares(panels, draw, mark)


def draw_latencies(rows: Sequence[SettingRow], mark: str) -> str:
    """Draw milliseconds of each stage, from the median to the 95th percentile.

    Args:
        rows: At least one that was timed.
        mark: As :func:`draw_accuracies` has it.
    """
    rows = [row for row in rows if row.latency_ms][:_MAX_ROWS]

    def draw(axes: Axes, stage: str) -> None:
        for place, row in enumerate(rows):
            times = row.latency_ms.get(stage)
            if times is not None:
                color = _LOOKS[row.positions]["color"]
                axes.hlines([place], times["median"], times["p95"], color=color)
                axes.plot([times["median"]], [place], **_LOOKS[row.positions])
        axes.set_xlim(left=0)
        axes.set_xlabel("ms")
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        _name_rows(axes, rows)

    stages = stages_of(rows)[-_MAX_STAGES:]
    cells = [(_short(stage, _MAX_NAME), stage) for stage in stages]
    return _draw_grid(cells, draw, rows, most=4, height=0.9 + _ROW * len(rows), mark=mark)


def _draw_shares(
    panels: Sequence[Panel], draw_panel: Callable[[Axes, Panel], None], mark: str
) -> str:
    """Draw panels whose vertical axis is percent."""

    def draw(axes: Axes, panel: Panel) -> None:
        draw_panel(axes, panel)
        axes.set_ylim(-3, 103)
        axes.grid(axis="y", color=GRID, linewidth=0.8)

    panels = panels[:_MAX_PANELS]
    rows = [row for panel in panels for row in panel.rows]
    cells = [(_short(panel.title), panel) for panel in panels]
    return _draw_grid(cells, draw, rows, most=3, height=_PANEL, mark=mark)


def _draw_grid(
    cells: Sequence[tuple[str, Any]],
    draw_cell: Callable[[Axes, Any], None],
    rows: Sequence[SettingRow],
    *,
    most: int,
    height: float,
    mark: str,
) -> str:
    """Draw panels in a grid, with one legend and the vertical axis at the left alone.

    Args:
        cells: Title of each panel, and what is drawn in it.
        draw_cell: Draws it.
        rows: Those that the legend explains.
        most: Panels side by side, at most.
        height: Height of a panel in inches.
        mark: As :func:`draw_accuracies` has it.
    """
    lines = math.ceil(len(cells) / most)
    columns = math.ceil(len(cells) / lines) if most > 3 else min(most, len(cells))

    def draw(figure: Figure) -> None:
        grid = list(figure.subplots(lines, columns, squeeze=False, sharey=True).flat)
        for index, (axes, (title, cell)) in enumerate(zip(grid, cells, strict=False)):
            draw_cell(axes, cell)
            axes.set_title(title, fontsize=10)
            if index % columns:
                axes.set_ylabel("")
                axes.tick_params(axis="y", labelleft=False)
        for axes in grid[len(cells) :]:
            axes.set_visible(False)
        _add_legend(figure, rows)

    width = _WIDTHS[min(columns, 3) - 1]
    return draw_svg(draw, size=(width, 0.5 + height * lines), mark=mark)


def _errors(found: Sequence[Accuracy]) -> list[list[float]]:
    """How far intervals reach below and above, in percent, as errorbar takes them."""
    # An interval of a bootstrap need not hold the value it is of.
    below = [max(0.0, 100 * (one.acc_at_50 - one.ci95[0])) for one in found]
    above = [max(0.0, 100 * (one.ci95[1] - one.acc_at_50)) for one in found]
    return [below, above]


def _name_rows(axes: Axes, rows: Sequence[SettingRow]) -> None:
    """Name the rows of an axis, the first one on top."""
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [_short(row.name) for row in rows])


def _add_legend(figure: Figure, rows: Sequence[SettingRow]) -> None:
    from matplotlib.lines import Line2D

    looks = [_LOOKS[positions] for positions in dict.fromkeys(row.positions for row in rows)]
    handles = [Line2D([], [], **look) for look in looks]
    columns = 5 if figure.get_figwidth() > _WIDTHS[0] else 3
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)


def _short(name: str, limit: int = _MAX_LABEL) -> str:
    """A name of letters that a figure's font has; of a long one the beginning."""
    text = drawable(name)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
