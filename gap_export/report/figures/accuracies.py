"""Accuracies, tokens and latencies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from gap_export.evaluation.results import Accuracy, SettingRow
from gap_export.evaluation.settings import SettingPositions
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
from gap_export.report.panels import Panel, names_of, stages_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches.
_ROW, _FRAME, _PANEL = 0.3, 1.2, 2.7
# Widths of figures with one, two and three panels side by side.
_WIDTHS = (5.0, 8.0, WIDTH)
# Beyond these a figure tells no more than its table.
_MAX_ROWS, _MAX_PANELS, _MAX_GROUPS, _MAX_STAGES = 100, 12, 8, 12
_COLUMNS = 3
# As many letters below a panel stand side by side.
_ROOM = 38
_MAX_LABEL, _MAX_NAME = 48, 18
_PRUNER_MARKERS = "osD^v<>Ph*"


@dataclass(frozen=True, kw_only=True)
class _Look:
    color: str
    marker: str
    line: Literal["-", "--", ":", "-."]
    label: str


_LOOKS: Mapping[SettingPositions, _Look] = MappingProxyType(
    {
        "none": _Look(color=INK, marker="D", line="-", label="unpruned"),
        "compact": _Look(color=VERMILLION, marker="s", line="--", label="compact positions"),
        "gap": _Look(color=BLUE, marker="o", line="-", label="GAP"),
        "permuted": _Look(color=PURPLE, marker="^", line=":", label="permuted"),
        "shifted": _Look(color=GREEN, marker="v", line="-.", label="shifted"),
    }
)


def draw_accuracies(rows: Sequence[SettingRow], mark: str) -> str:
    """Acc@0.5 of each setting with its interval, from top to bottom.

    Args:
        rows: At least one.
        mark: See :func:`gap_export.report.figures.draw_svg`.

    Returns:
        An ``<svg>`` element without declaration; what it holds of names is outlines of letters.
    """
    rows = rows[:_MAX_ROWS]

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for index, row in enumerate(rows):
            look = _LOOKS[row.positions]
            axes.errorbar(
                [100 * row.acc_at_50],
                [index],
                xerr=_errors([row]),
                fmt=look.marker,
                color=look.color,
                markersize=7,
                capsize=4,
            )
        axes.set_xlim(-2, 102)
        axes.set_xlabel("Acc@0.5 in percent, with its 95 % interval")
        _name_rows(axes, rows)
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        _add_legend(figure, rows)

    return draw_svg(draw, size=(WIDTH, _FRAME + _ROW * len(rows)), mark=mark)


def draw_thresholds(panels: Sequence[Panel], mark: str) -> str:
    """Share of hits by threshold of IoU: a panel for each pruner and keep ratio.

    Args:
        panels: At least one.
        mark: As :func:`draw_accuracies` has it.
    """

    def draw(axes: Axes, panel: Panel) -> None:
        for row in panel.rows:
            look = _LOOKS[row.positions]
            axes.plot(
                [float(name) for name in row.curve],
                [100 * share for share in row.curve.values()],
                color=look.color,
                marker=look.marker,
                linestyle=look.line,
                markersize=5,
            )
        axes.set_xticks([0.1, 0.3, 0.5, 0.7, 0.9])
        axes.set_xlabel("threshold of IoU")

    return _draw_panels(panels, draw, "hits in percent", mark)


def draw_groups(
    panels: Sequence[Panel], groups_of: Callable[[SettingRow], Mapping[str, Accuracy]], mark: str
) -> str:
    """Acc@0.5 with its interval of each group of expressions: a panel for each pruner and keep.

    Args:
        panels: At least one.
        groups_of: Accuracies by group, of a row.
        mark: As :func:`draw_accuracies` has it.
    """
    names = names_of(groups_of(row) for panel in panels for row in panel.rows)[:_MAX_GROUPS]

    def draw(axes: Axes, panel: Panel) -> None:
        for index, row in enumerate(panel.rows):
            look = _LOOKS[row.positions]
            # Side by side, around the group's place.
            aside = 0.18 * (index - (len(panel.rows) - 1) / 2)
            groups = groups_of(row)
            places = [place for place, name in enumerate(names) if name in groups]
            found = [groups[names[place]] for place in places]
            axes.errorbar(
                [place + aside for place in places],
                [100 * one.acc_at_50 for one in found],
                yerr=_errors(found),
                fmt=look.marker,
                color=look.color,
                markersize=6,
                capsize=3,
            )
        axes.set_xlim(-0.6, len(names) - 0.4)
        labels = [_short(name, _MAX_NAME) for name in names]
        axes.set_xticks(range(len(names)), labels)
        if sum(map(len, labels)) > _ROOM:
            axes.tick_params(axis="x", labelrotation=20)

    return _draw_panels(panels, draw, "Acc@0.5 in percent", mark)


def draw_tokens(rows: Sequence[SettingRow], mark: str) -> str:
    """Acc@0.5 by the number of visual tokens the decoder reads: a line for each pruner.

    Args:
        rows: At least one.
        mark: As :func:`draw_accuracies` has it.
    """
    lines: dict[tuple[str, SettingPositions], list[SettingRow]] = {}
    for row in rows[:_MAX_ROWS]:
        lines.setdefault((row.pruner, row.positions), []).append(row)
    pruners = list(dict.fromkeys(pruner for pruner, positions in lines if positions != "none"))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for (pruner, positions), members in lines.items():
            look = _LOOKS[positions]
            ordered = sorted(members, key=lambda row: row.mean_visual_tokens)
            marker = look.marker
            if positions in ("compact", "gap"):
                marker = _PRUNER_MARKERS[pruners.index(pruner) % len(_PRUNER_MARKERS)]
            axes.errorbar(
                [row.mean_visual_tokens for row in ordered],
                [100 * row.acc_at_50 for row in ordered],
                yerr=_errors(ordered),
                color=look.color,
                linestyle=look.line,
                marker=marker,
                markersize=7,
                capsize=3,
                label=_short(f"{pruner}, {look.label}" if pruner != "none" else look.label),
            )
        axes.set_xlim(left=0)
        axes.set_ylim(-3, 103)
        axes.set_xlabel("visual tokens the decoder reads, mean")
        axes.set_ylabel("Acc@0.5 in percent")
        axes.grid(color=GRID, linewidth=0.8)
        figure.legend(loc="outside right upper", frameon=False)

    return draw_svg(draw, size=(WIDTH, max(4.0, _FRAME + 0.25 * len(lines))), mark=mark)


def draw_latencies(rows: Sequence[SettingRow], mark: str) -> str:
    """Milliseconds of each stage, from the median to the 95th percentile.

    Args:
        rows: At least one that was timed.
        mark: As :func:`draw_accuracies` has it.
    """
    rows = [row for row in rows if row.latency_ms][:_MAX_ROWS]
    stages = stages_of(rows)[-_MAX_STAGES:]
    lines = math.ceil(len(stages) / (_COLUMNS + 1))
    columns = math.ceil(len(stages) / lines)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for index, axes in enumerate(grid.flat):
            if index >= len(stages):
                axes.set_visible(False)
                continue
            stage = stages[index]
            for place, row in enumerate(rows):
                times, look = row.latency_ms.get(stage), _LOOKS[row.positions]
                if times is not None:
                    axes.hlines([place], times["median"], times["p95"], color=look.color)
                    axes.plot([times["median"]], [place], look.marker, color=look.color)
            axes.set_title(_short(stage, _MAX_NAME), fontsize=10)
            axes.set_xlim(left=0)
            axes.set_xlabel("ms")
            axes.grid(axis="x", color=GRID, linewidth=0.8)
            _name_rows(axes, rows, named=index % columns == 0)
        _add_legend(figure, rows)

    return draw_svg(draw, size=(WIDTH, 0.5 + lines * (0.9 + _ROW * len(rows))), mark=mark)


def _draw_panels(
    panels: Sequence[Panel], draw_panel: Callable[[Axes, Panel], None], label: str, mark: str
) -> str:
    panels = panels[:_MAX_PANELS]
    columns = min(_COLUMNS, len(panels))
    lines = math.ceil(len(panels) / columns)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
        for index, axes in enumerate(grid.flat):
            if index >= len(panels):
                axes.set_visible(False)
                continue
            draw_panel(axes, panels[index])
            axes.set_ylim(-3, 103)
            axes.set_title(_short(panels[index].title), fontsize=10)
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            if index % columns == 0:
                axes.set_ylabel(label)
        _add_legend(figure, [row for panel in panels for row in panel.rows])

    return draw_svg(draw, size=(_WIDTHS[columns - 1], 0.5 + _PANEL * lines), mark=mark)


def _errors(found: Sequence[Accuracy]) -> list[list[float]]:
    """How far intervals reach below and above, in percent, as errorbar takes them."""
    # An interval of a bootstrap need not hold the value it is of.
    below = [max(0.0, 100 * (one.acc_at_50 - one.ci95[0])) for one in found]
    above = [max(0.0, 100 * (one.ci95[1] - one.acc_at_50)) for one in found]
    return [below, above]


def _name_rows(axes: Axes, rows: Sequence[SettingRow], *, named: bool = True) -> None:
    """The first on top."""
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_yticks(range(len(rows)), [_short(row.name) for row in rows])
    axes.tick_params(axis="y", labelleft=named)


def _add_legend(figure: Figure, rows: Sequence[SettingRow]) -> None:
    from matplotlib.lines import Line2D

    looks = [_LOOKS[positions] for positions in dict.fromkeys(row.positions for row in rows)]
    handles = [
        Line2D([], [], color=look.color, marker=look.marker, linestyle=look.line, label=look.label)
        for look in looks
    ]
    columns = 5 if figure.get_figwidth() > _WIDTHS[0] else 3
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)


def _short(name: str, limit: int = _MAX_LABEL) -> str:
    """Of letters that the image's font has; the beginning is kept."""
    text = drawable(name)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
