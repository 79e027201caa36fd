#!/usr/bin/env python3
"""The demo models on RefShapes-2, which none of them has seen: unpruned, and with each pruner.

    tools/refshapes2_table.py                      all demo models, about two hours on one core
    tools/refshapes2_table.py refshapes-llava --samples 200
    tools/refshapes2_table.py --write              into docs/results/refshapes-2.md

Answers are kept below ``--results`` as they come: started again, it asks what is not answered yet.
Ranks on RefShapes are those of models/*/accuracy.csv.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from pages import ROOT, called_as, interval, percent, publish
from paper_report.measured import Measured, Row, read_csv
from paper_table import MODELS, ask

from gap_export.cli import main as run
from gap_export.evaluation.evaluate import Asking
from gap_export.evaluation.run import make_folder
from gap_export.exporting import ExportOptions
from gap_export.families import supported_pruners
from gap_export.spec.recipe import find_recipe
from gap_export.spec.requests import PruningRequest

DATA = "refshapes-2"
KEEP = 0.3
PRUNERS = (
    *("random", "spatial", "divprune", "extent", "extent-llm", "cdpruner-llm", "text-llm"),
    *("fastervlm", "fastervlm-received"),
)


def main(
    model: Annotated[list[str] | None, typer.Argument(help="Demo models; all.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out expressions.")] = 1000,
    seed: int = 0,
    workers: Annotated[str, typer.Option(help="As of gap-export eval.")] = "1",
    results: Path = Path("refshapes2-results"),
    write: Annotated[bool, typer.Option(help="Put the page into docs/.")] = False,
) -> None:
    """Measure what is not measured yet, and write the page."""
    reports = {}
    for name in model or MODELS:
        folder = results / f"{name}-{samples}-{seed}"
        make_folder(folder, "results")
        served = supported_pruners(find_recipe(name)[0])
        reports[name] = ask(
            folder,
            ExportOptions(model=name, pruning=PruningRequest(seed=seed)),
            PruningRequest(seed=seed).variants([p for p in PRUNERS if p in served], (KEEP,)),
            samples=samples,
            asking=Asking(data=DATA, workers=workers, records=folder),
        )
    parts = [f"`{called_as('refshapes2_table.py')}`", format_overview(reports)]
    parts += [format_model(name, report) for name, report in reports.items()]
    publish("refshapes-2", "\n\n".join(parts), write=write)


def format_overview(reports: Mapping[str, Row]) -> str:
    """A line a model: unpruned on both sets, and by kind of expression."""
    kinds = sorted({kind for report in reports.values() for kind in unpruned(report)["by_kind"]})
    lines = [
        f"| model | RefShapes | RefShapes-2 | {' | '.join(kinds)} |",
        "|---" * (3 + len(kinds)) + "|",
    ]
    for name, report in reports.items():
        whole = unpruned(report)
        easy = next(row for row in published(name) if row["positions"] == "none")
        of_kinds = [whole["by_kind"].get(kind) for kind in kinds]
        cells = [
            "" if one is None else f"{percent(one['acc_at_50'])} (n {one['n']})" for one in of_kinds
        ]
        lines.append(
            f"| {name} | {percent(easy['acc_at_50'])} | **{percent(whole['acc_at_50'])}** "
            f"({interval(whole['ci95'])}) | {' | '.join(cells)} |"
        )
    return "\n".join(["Unpruned:", "", *lines])


def format_model(name: str, report: Row) -> str:
    """A section: pruners from the best to the worst, each with its rank on RefShapes."""
    whole = unpruned(report)
    pruned = [row for row in report["rows"] if row["keep_ratio"] == KEEP]
    compact, gap = (
        {row["pruner"]: row for row in pruned if row["positions"] == mode}
        for mode in ("compact", "gap")
    )
    easy = {
        row["pruner"]: row["acc_at_50"]
        for row in published(name)
        if (row["keep_ratio"], row["positions"], row["budget"]) == (KEEP, "gap", "fixed")
    }
    both = [pruner for pruner in gap if pruner in easy]
    here = ranks({pruner: gap[pruner]["acc_at_50"] for pruner in both})
    there = ranks({pruner: easy[pruner] for pruner in both})
    lines = [
        f"## {name}",
        "",
        f"{whole['n']} held-out expressions on {whole['num_images']} images, seed "
        f"{whole['seed']}, greedy, protocol {whole['protocol']}; keep {KEEP:g}; intervals are "
        f"95 %. Unpruned: **{percent(whole['acc_at_50'])}** ({interval(whole['ci95'])}).",
        "",
        f"| pruner | compact | GAP | of the unpruned | rank of {len(both)} "
        "| on RefShapes: rank | GAP |",
        "|---" * 7 + "|",
    ]
    best = max(gap.values(), key=lambda row: row["acc_at_50"])
    for pruner, row in sorted(gap.items(), key=lambda item: -item[1]["acc_at_50"]):
        share = "" if row["recovered"] is None else percent(row["recovered"])
        known = ["", "not measured", ""]
        if pruner in both:
            known = [f"{here[pruner]:g}", f"{there[pruner]:g}", percent(easy[pruner])]
        lines.append(
            f"| `{pruner}` | {percent(compact[pruner]['acc_at_50'])} "
            f"({interval(compact[pruner]['ci95'])}) | **{percent(row['acc_at_50'])}** "
            f"({interval(row['ci95'])}) | {share} | {' | '.join(known)} |"
        )
    near = sum(row["ci95"][1] >= best["ci95"][0] for row in gap.values())
    agreement = np.corrcoef([(here[p], there[p]) for p in both], rowvar=False)[0, 1]
    lines += [
        "",
        f"Intervals of {near} of {len(gap)} pruners overlap that of the best. The rank "
        f"correlation (Spearman's) with RefShapes is {agreement:.2f}, over {len(both)} pruners.",
    ]
    return "\n".join(lines)


def unpruned(report: Row) -> Row:
    """The row of all tokens with their own ids."""
    row: Row = next(row for row in report["rows"] if row["positions"] == "none")
    return row


def published(name: str) -> Sequence[Row]:
    """What was measured of a model on RefShapes."""
    recipe, _ = find_recipe(name)
    rows = read_csv(ROOT / "models" / name / "accuracy.csv")
    return Measured(recipe=recipe, spec="refshapes", all_rows=rows).rows()


def ranks(accuracies: Mapping[str, float]) -> dict[str, float]:
    """1 for the best; those that are equal share the mean of their ranks."""
    values = list(accuracies.values())
    return {
        name: sum(other > one for other in values) + (1 + values.count(one)) / 2
        for name, one in accuracies.items()
    }


def build_command() -> Any:
    """The command that reads the arguments."""
    app = typer.Typer(add_completion=False)
    app.command()(main)
    return typer.main.get_command(app)


if __name__ == "__main__":
    sys.exit(run(command=build_command, program="refshapes2_table.py"))
