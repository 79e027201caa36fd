"""Measure every pruner on the demo model, GAP against compact, and write the table to the README.

    tools/pruner_table.py                    about an hour on two cores; may be stopped and resumed
    tools/pruner_table.py --samples 200      quicker and coarser
    tools/pruner_table.py --no-readme        prints the table instead

What has been measured lies in ``--results``, one file a pruner, named after what was asked; a file
that is there is not measured again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import typer
from readme_figures import percent, write_section

from gap_export.evaluation.accuracy import evaluate_model
from gap_export.families import supported_pruners
from gap_export.pipeline import ExportOptions
from gap_export.recipe import find_recipe

ROOT = Path(__file__).resolve().parent.parent
MODEL = "refshapes-llava"
README = ROOT / "README.md"
KEEPS = (0.5, 0.3, 0.1)
SECTION = "pruners"


def main(
    samples: int = 1000,
    seed: int = 0,
    results: Path = Path("pruner-results"),
    readme: bool = True,
) -> None:
    """Measure what is not measured yet, and write the table."""
    results.mkdir(parents=True, exist_ok=True)
    measured = {}
    for name in supported_pruners(find_recipe(MODEL)[0]):
        path = results / f"{name}-{samples}-{seed}.json"
        if not path.exists():
            report = evaluate_model(
                ExportOptions(model=MODEL, seed=seed),
                pruners=[name],
                keep_ratios=KEEPS,
                num_samples=samples,
            )
            part = path.with_suffix(".part")
            part.write_text(json.dumps(report.to_plain(), indent=1), encoding="utf-8")
            part.rename(path)
            typer.echo(f"measured {name}", err=True)
        measured[name] = json.loads(path.read_text(encoding="utf-8"))["rows"]
    table = format_table(measured, samples=samples, seed=seed)
    if readme:
        write_section(README, SECTION, table)
    else:
        typer.echo(table)


def format_table(measured: dict[str, list[dict[str, Any]]], *, samples: int, seed: int) -> str:
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
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
