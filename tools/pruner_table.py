#!/usr/bin/env python3
"""Measure every pruner on the demo model, GAP against compact, and write the table to the README.

    tools/pruner_table.py                    about an hour on two cores; may be stopped and resumed
    tools/pruner_table.py --samples 200      quicker and coarser
    tools/pruner_table.py --no-readme        prints the table instead

What has been measured lies in ``--results``, one file a pruner, named after what was asked; a file
that is there is not measured again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import typer
from readme_figures import percent, write_section

from gap_export.evaluation.accuracy import evaluate_model
from gap_export.families import supported_pruners
from gap_export.pipeline import ExportOptions
from gap_export.pruning import find_preset
from gap_export.recipe import find_recipe

ROOT = Path(__file__).resolve().parent.parent
MODEL = "refshapes-llava"
README = ROOT / "README.md"
KEEPS = (0.5, 0.3, 0.1)
SECTION = "pruners"

Rows = list[dict[str, Any]]


def main(
    samples: int = 1000,
    seed: int = 0,
    results: Path = Path("pruner-results"),
    readme: bool = True,
) -> None:
    """Measure what is not measured yet, and write the table."""
    results.mkdir(parents=True, exist_ok=True)
    fixed, adaptive = {}, {}
    for name in supported_pruners(find_recipe(MODEL)[0]):
        path = results / f"{name}-{samples}-{seed}.json"
        fixed[name] = measure(
            path, name, ExportOptions(model=MODEL, seed=seed), keeps=KEEPS, samples=samples
        )
        if "adaptive" in find_preset(name).budgets:
            path = results / f"{name}-adaptive-{samples}-{seed}.json"
            options = ExportOptions(model=MODEL, seed=seed, budget="adaptive")
            adaptive[name] = measure(path, name, options, keeps=(1.0,), samples=samples)
    table = "\n".join(
        [*format_fixed(fixed, samples=samples, seed=seed), "", *format_adaptive(adaptive)]
    )
    if readme:
        write_section(README, SECTION, table)
    else:
        typer.echo(table)


def measure(
    path: Path, name: str, options: ExportOptions, *, keeps: Sequence[float], samples: int
) -> Rows:
    """Rows of one pruner, from ``path`` if they are there."""
    if not path.exists():
        report = evaluate_model(options, pruners=[name], keep_ratios=keeps, num_samples=samples)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(report.to_plain(), indent=1), encoding="utf-8")
        part.rename(path)
        typer.echo(f"measured {path.stem}", err=True)
    rows: Rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return rows


def format_adaptive(measured: dict[str, Rows]) -> list[str]:
    """One line a pruner that lets the picture decide how many stay."""
    lines = [
        "With `--budget adaptive`, where each picture, and each expression, decides how many stay:",
        "",
        "| pruner | tokens, on average | compact | GAP |",
        "|---|---|---|---|",
    ]
    for name, rows in measured.items():
        compact, gap = (
            next(row for row in rows if row["positions"] == mode) for mode in ("compact", "gap")
        )
        lines.append(
            f"| `{name}` | {gap['mean_visual_tokens']:.1f} of {rows[0]['mean_visual_tokens']:.0f} "
            f"| {percent(compact['acc_at_50'])} | **{percent(gap['acc_at_50'])}** |"
        )
    return lines


def format_fixed(measured: dict[str, Rows], *, samples: int, seed: int) -> list[str]:
    """One line a pruner: compact and GAP at every share."""
    whole = next(iter(measured.values()))[0]
    heads = " | ".join(f"keep {keep:g}: compact | GAP" for keep in KEEPS)
    lines = [
        f"`tools/pruner_table.py --samples {samples} --seed {seed}`",
        "",
        f"{whole['n']} held-out expressions on {whole['num_images']} pictures, greedy, Acc@0.5. "
        f"Unpruned: **{percent(whole['acc_at_50'])}**.",
        "",
        f"| pruner | {heads} |",
        "|---" * (1 + 2 * len(KEEPS)) + "|",
    ]
    lost = []
    for name, rows in measured.items():
        cells = []
        for keep in KEEPS:
            compact, gap = (
                next(
                    row["acc_at_50"]
                    for row in rows
                    if row["positions"] == mode and row["keep_ratio"] == keep
                )
                for mode in ("compact", "gap")
            )
            cells += [percent(compact), f"**{percent(gap)}**"]
            if gap <= compact:
                lost.append(f"{name} at keep {keep:g}")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += [
        "",
        "GAP is ahead of compact ids in every row and column."
        if not lost
        else f"GAP is not ahead of compact ids for {', '.join(lost)}.",
    ]
    return lines


if __name__ == "__main__":
    typer.run(main)
