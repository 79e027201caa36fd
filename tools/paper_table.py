#!/usr/bin/env python3
"""The paper's experiment on trained models: family x pruner x keep x {compact, GAP}.

Every pruner that a family supports, at each share of tokens, with compact ids and with GAP, and the
paper's two misalignments with no token dropped at all (permuted and shifted, its figure 2(b)).

    tools/paper_table.py                      all demo models, about an hour on two cores
    tools/paper_table.py --samples 200        quicker and coarser
    tools/paper_table.py --workers 2          sharded over local workers, needs the extra [ray]
    tools/paper_table.py --no-publish         everything below --results, README and cards untouched

Answers are kept below ``--results`` as they come: started again, it asks what is not answered yet.
Each model gets a CSV, a Markdown table and plots; ``--publish`` puts them beside the model, and the
summary into the README.
"""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from paper_report.measured import Measured, Row
from paper_report.plots import draw_table
from paper_report.words import format_card, format_model, format_summary
from readme_figures import write_section

from gap_export.cli import main as run
from gap_export.cli._progress import TerminalProgress
from gap_export.evaluation.evaluate import Asking, evaluate_model
from gap_export.evaluation.run import make_folder
from gap_export.evaluation.settings import MISALIGNMENTS
from gap_export.families import supported_pruners
from gap_export.pipeline import ExportOptions
from gap_export.pruning import find_preset
from gap_export.recipe import find_recipe

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
MODELS = ("refshapes-llava", "refshapes-shikra", "refshapes-minigpt-v2")
KEEPS = (0.5, 0.3, 0.1)
COLUMNS = (
    *("model", "protocol", "seed", "pruner", "budget", "keep_ratio", "positions"),
    *("mean_visual_tokens", "n", "num_images", "acc_at_50", "ci95_low", "ci95_high"),
    *("mean_iou", "parse_failures", "recovered"),
)


def main(
    model: Annotated[list[str] | None, typer.Option(help="Repeatable; all demo models.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Expressions per setting.")] = 1000,
    seed: int = 0,
    workers: Annotated[str, typer.Option(help="As of gap-export eval.")] = "1",
    results: Path = Path("paper-results"),
    publish: bool = True,
) -> None:
    """Measure what is not measured yet, and write tables and plots."""
    # A slip in the last name must not cost the hours of those before it.
    names = dict.fromkeys(find_recipe(name)[0].name for name in model or MODELS)
    measured = []
    for name in names:
        folder = results / f"{name}-{samples}-{seed}"
        make_folder(folder, "results")
        one = measure(name, folder, samples=samples, seed=seed, workers=workers)
        measured.append(one)
        write_csv(folder / "accuracy.csv", one.rows())
        draw_table(one.rows(), folder / "accuracy.png", title=one.recipe.name)
        (folder / "accuracy.md").write_text(format_model(one), encoding="utf-8")
        typer.echo(f"wrote {folder}", err=True)
    command = f"tools/paper_table.py --samples {samples} --seed {seed}"
    summary = format_summary(measured, command=command)
    (results / "summary.md").write_text(summary, encoding="utf-8")
    if not publish:
        typer.echo(summary)
        return
    for one in measured:
        folder = results / f"{one.recipe.name}-{samples}-{seed}"
        home = ROOT / "models" / one.recipe.name
        (home / "pictures").mkdir(exist_ok=True)
        shutil.copy(folder / "accuracy.csv", home)
        shutil.copy(folder / "accuracy.png", home / "pictures")
        write_section(home / "README.md", "accuracy", format_card(one, command=command))
    if not model:
        write_section(README, "paper", summary)


def measure(name: str, folder: Path, *, samples: int, seed: int, workers: str) -> Measured:
    """Ask one model everything that ``folder`` has no answer to."""
    recipe, _ = find_recipe(name)
    pruners = supported_pruners(recipe)
    report = ask(
        folder / "fixed",
        ExportOptions(model=name, seed=seed),
        pruners=pruners,
        keeps=KEEPS,
        samples=samples,
        asking=Asking(misaligned=MISALIGNMENTS, workers=workers, records=folder / "fixed"),
    )
    # What they rank enters in another order even where nothing is dropped.
    reordering = [one for one in pruners if find_preset(one).order == "score"]
    if reordering:
        whole = ask(
            folder / "all-kept",
            ExportOptions(model=name, seed=seed),
            pruners=reordering,
            keeps=(1.0,),
            samples=samples,
            asking=Asking(workers=workers, records=folder / "all-kept"),
        )
        report = {**report, "rows": [*report["rows"], *whole["rows"][1:]]}
    adaptive = [one for one in pruners if "adaptive" in find_preset(one).budgets]
    return Measured(
        recipe=recipe,
        report=report,
        adaptive=ask(
            folder / "adaptive",
            ExportOptions(model=name, seed=seed, budget="adaptive"),
            pruners=adaptive,
            keeps=(1.0,),
            samples=samples,
            asking=Asking(workers=workers, records=folder / "adaptive"),
        )
        if adaptive
        else None,
    )


def ask(
    folder: Path,
    options: ExportOptions,
    *,
    pruners: tuple[str, ...] | list[str],
    keeps: tuple[float, ...],
    samples: int,
    asking: Asking,
) -> Row:
    """JSON form of one evaluation, kept beside its answers."""
    report = evaluate_model(
        options,
        pruners=pruners,
        keep_ratios=keeps,
        num_samples=samples,
        asking=asking,
        progress=TerminalProgress(),
    )
    plain: Row = report.to_plain()
    part = folder / "report.part"
    part.write_text(json.dumps(plain, indent=1), encoding="utf-8")
    part.rename(folder / "report.json")
    return plain


def write_csv(path: Path, rows: list[Row]) -> None:
    """One line a setting; shares 0..1."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            low, high = row["ci95"]
            writer.writerow({**row, "ci95_low": low, "ci95_high": high})


def build_command() -> Any:
    """The command that reads the arguments."""
    app = typer.Typer(add_completion=False)
    app.command()(main)
    return typer.main.get_command(app)


if __name__ == "__main__":
    sys.exit(run(command=build_command, program="paper_table.py"))
