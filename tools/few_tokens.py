#!/usr/bin/env python3
"""How far down the number of visual tokens can go: GAP, and GAP with proportional attention.

    tools/few_tokens.py                              all demo models, about half an hour
    tools/few_tokens.py refshapes-llava --samples 200
    tools/few_tokens.py --write                      into docs/results/few-tokens.md, with a plot

Everything is exported and asked by `gap-export eval`'s own code. The headline rows are asked with
two more seeds, whose expressions are others.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pages import DEMO_MODELS, IMAGES, called_as, interval, note, percent, publish

import gap_export
from gap_export.evaluation.results import EvaluationReport, SettingRow
from gap_export.report.figures import BLUE, GRID, INK, PURPLE, STYLE
from gap_export.spec.requests import PruningRequest

PRUNERS = ("cdpruner-llm", "extent-llm", "extent")
KEEPS = (0.5, 0.3, 0.2, 0.1, 0.05)
HEADLINE, HEADLINE_KEEPS, SEEDS = "cdpruner-llm", (0.3, 0.1), (0, 1, 2)
OWN = "gap+proportional"
# Share of the unpruned REC accuracy, as published, by share of tokens: other models, other data.
PUBLISHED = (
    ("GAP (arXiv 2506.21873), LLaVA-1.5-7B", 0.3, 0.916),
    ("IVC-Prune (2602.03060)", 0.5, 0.99),
    ("SwiftVLM, LLaVA", 0.33, 0.87),
    ("D2Pruner (2512.19443), InternVL2.5-8B", 0.1, 0.857),
)


def main(
    model: Annotated[list[str] | None, typer.Argument(help="Demo models; all.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out expressions.")] = 1000,
    write: Annotated[bool, typer.Option(help="Put page and plot into docs/.")] = False,
) -> None:
    """Measure, print, and with --write publish."""
    names = tuple(model or DEMO_MODELS)
    reports = {name: ask(name, PRUNERS, KEEPS, seed=0, samples=samples) for name in names}
    seeds = {
        (name, seed): reports[name]
        if seed == 0
        else ask(name, (HEADLINE,), HEADLINE_KEEPS, seed=seed, samples=samples)
        for name in names
        for seed in SEEDS
    }
    parts = [
        f"`{called_as('few_tokens.py')}`: {samples} held-out expressions a row; 95 % intervals, of "
        "differences paired by expression.",
        format_headline(names, seeds),
        "![Share of the unpruned accuracy by share of tokens](../images/few-tokens.png)",
        *(format_model(name, report) for name, report in reports.items()),
    ]
    if write:
        draw(reports, IMAGES / "few-tokens.png")
    publish("few-tokens", "\n\n".join(parts), write=write)


def ask(
    name: str, pruners: tuple[str, ...], keeps: tuple[float, ...], *, seed: int, samples: int
) -> EvaluationReport:
    """Every pruner at every share, without and with proportional attention."""
    note(f"{name}, seed {seed}")
    request = PruningRequest(attention="proportional", seed=seed)
    prunings = [replace(one, seed=seed) for one in request.variants(pruners, keeps)]
    return gap_export.evaluate(name, prunings=prunings, samples=samples, seed=seed)


def row_of(report: EvaluationReport, pruner: str, keep: float, positions: str) -> SettingRow:
    """One row of a report."""
    (row,) = (
        row
        for row in report.rows
        if (row.pruner, row.keep_ratio, row.positions) == (pruner, keep, positions)
    )
    return row


def share(row: SettingRow) -> str:
    """Accuracy, and what that is of the unpruned."""
    assert row.recovered is not None
    return f"{percent(row.acc_at_50)} ({percent(row.recovered)})"


def format_headline(
    names: tuple[str, ...], reports: dict[tuple[str, int], EvaluationReport]
) -> str:
    """Each seed of the headline rows: accuracy and share of the unpruned."""
    lines = [
        f"`{HEADLINE}` with proportional attention, Acc@0.5 (share of the unpruned):",
        "",
        "| model | keep | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " |",
        "|---|---|" + "---|" * len(SEEDS),
    ]
    for name in names:
        for keep in HEADLINE_KEEPS:
            cells = [share(row_of(reports[name, seed], HEADLINE, keep, OWN)) for seed in SEEDS]
            lines.append(f"| {name} | {keep:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def format_model(name: str, report: EvaluationReport) -> str:
    """A section: a row a pruner and share."""
    compared = {(one.first, one.second): one for one in report.comparisons}
    whole = report.rows[0]
    lines = [
        f"## {name}",
        "",
        f"Unpruned: {percent(whole.acc_at_50)} {interval(list(whole.ci95))}.",
        "",
        "| pruner | keep | tokens | compact | GAP | GAP, proportional (of the unpruned) "
        "| proportional less plain, points |",
        "|---|---|---|---|---|---|---|",
    ]
    for pruner in PRUNERS:
        for keep in KEEPS:
            compact, gap, own = (
                row_of(report, pruner, keep, arm) for arm in ("compact", "gap", OWN)
            )
            gain = compared[own.name, gap.name]
            low, high = (100 * end for end in gain.ci95)
            lines.append(
                f"| `{pruner}` | {keep:g} | {own.mean_visual_tokens:.0f} "
                f"| {percent(compact.acc_at_50)} | {percent(gap.acc_at_50)} "
                f"| **{share(own)}** | {100 * gain.difference:+.1f} ({low:+.1f} to {high:+.1f}) |"
            )
    return "\n".join(lines)


def draw(reports: dict[str, EvaluationReport], path: Path) -> None:
    """Share of the unpruned accuracy by share of tokens, a panel a model."""
    with rc_context(STYLE):
        figure = Figure(figsize=(2.6 * len(reports), 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        panels: Any = figure.subplots(1, len(reports), sharey=True, squeeze=False)
        for panel, (name, report) in zip(panels[0], reports.items(), strict=True):
            for arm, color, label in (("gap", BLUE, "GAP"), (OWN, PURPLE, "GAP, proportional")):
                rows = [row_of(report, HEADLINE, keep, arm) for keep in KEEPS]
                shares = [100 * (row.recovered or 0.0) for row in rows]
                panel.plot(KEEPS, shares, color=color, marker="o", markersize=4, label=label)
            for number, (what, keep, kept) in enumerate(PUBLISHED):
                marker = "xP^v"[number]
                panel.plot(
                    [keep], [100 * kept], marker, color=INK, markersize=5, label=what, alpha=0.6
                )
            panel.set_xscale("log")
            panel.set_xticks(KEEPS, [f"{100 * keep:g} %" for keep in KEEPS])
            panel.minorticks_off()
            panel.set_title(name.removeprefix("refshapes-"), fontsize=10)
            panel.set_xlabel("visual tokens kept")
            panel.grid(color=GRID, linewidth=0.6)
            panel.set_ylim(0, 103)
        panels[0][0].set_ylabel("% of the unpruned accuracy")
        figure.suptitle(
            f"{HEADLINE} on RefShapes, and published shares of other models on RefCOCO", color=INK
        )
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(typer.run(main))
