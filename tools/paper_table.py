#!/usr/bin/env python3
"""The paper's experiment on trained models: family x pruner x keep x {compact, GAP}.

Every pruner that a family supports, at each share of tokens, with compact ids and with GAP, and the
paper's two misalignments with no token dropped at all (permuted and shifted, its figure 2(b)).

    tools/paper_table.py                      all demo models, about an hour on two cores
    tools/paper_table.py --samples 200        quicker and coarser
    tools/paper_table.py --workers 2          sharded over local workers, needs the extra [ray]
    tools/paper_table.py --write              put the results into pages, plots and CSVs
    tools/paper_table.py --pruner trim        trim alone; the other rows stay as they were published
    tools/paper_table.py --published --write  measure nothing: pages and plots of what is published
    tools/paper_table.py --report eval.json   measure nothing: rows of `gap-export eval MODEL
                                              --report-json` replace those that were published

Answers are kept below ``--results`` as they come: started again, it asks what is not answered yet.
Each model gets a CSV, a Markdown table and plots there; ``--write`` puts them beside the model, the
plots into docs/images, and the tables into docs/results, README.md and the models' cards.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pages import DEMO_MODELS, IMAGES, ROOT, publish, write_section
from paper_report.measured import (
    Measured,
    Row,
    asks_bare,
    merge_rows,
    read_csv,
    rows_of,
    with_budget,
    write_csv,
)
from paper_report.plots import draw_table
from paper_report.words import (
    TEXT_KEEPS,
    format_card,
    format_front,
    format_model,
    format_summary,
)

from gap_export.cli import main as run
from gap_export.cli._progress import TerminalProgress
from gap_export.evaluation.evaluate import Asking, evaluate_model
from gap_export.evaluation.run import make_folder
from gap_export.evaluation.settings import MISALIGNMENTS
from gap_export.exporting import ExportOptions
from gap_export.families import supported_pruners
from gap_export.pruning import find_preset
from gap_export.spec.manifest import PrunerText
from gap_export.spec.recipe import find_recipe
from gap_export.spec.requests import PruningRequest

KEEPS = (0.5, 0.3, 0.1)
DATA = "refshapes"


def main(
    model: Annotated[list[str] | None, typer.Option(help="Repeatable; all demo models.")] = None,
    pruner: Annotated[
        list[str] | None,
        typer.Option(help="Repeatable; all. With it only what these prune is measured anew."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Expressions per setting.")] = 1000,
    seed: int = 0,
    workers: Annotated[str, typer.Option(help="As of gap-export eval.")] = "1",
    report: Annotated[
        list[Path] | None,
        typer.Option(help="Repeatable; what gap-export eval MODEL --report-json wrote."),
    ] = None,
    results: Path = Path("paper-results"),
    published: Annotated[
        bool, typer.Option(help="Measure nothing; take models/*/accuracy.csv.")
    ] = False,
    write: Annotated[bool, typer.Option(help="Put the results into the pages.")] = False,
) -> None:
    """Measure what is not measured yet, and write tables and plots."""
    # A slip in the last name must not cost the hours of those before it.
    names = dict.fromkeys(find_recipe(name)[0].name for name in model or DEMO_MODELS)
    only = [find_preset(name).name for name in pruner or []]
    command = f"tools/paper_table.py --samples {samples} --seed {seed}"
    if report or published:
        plain = [json.loads(path.read_text(encoding="utf-8")) for path in report or ()]
        show([read_published(name, plain) for name in names], command, write=write)
        return
    measured = []
    for name in names:
        folder = results / f"{name}-{samples}-{seed}"
        make_folder(folder, "results")
        one = measure(name, folder, only, samples=samples, seed=seed, workers=workers)
        measured.append(one)
        write_csv(folder / "accuracy.csv", one.all_rows)
        draw_table(one.rows(), folder / "accuracy.png", title=one.recipe.name)
        (folder / "accuracy.md").write_text(format_model(one), encoding="utf-8")
        typer.echo(f"wrote {folder}", err=True)
    show(measured, command, write=write)


def read_published(name: str, reports: list[Row]) -> Measured:
    """What was published of a model, with rows of evaluations in place of the same settings'."""
    recipe, _ = find_recipe(name)
    rows = read_csv(ROOT / "models" / name / "accuracy.csv")
    for report in reports:
        if report["model"] == name:
            rows = merge_rows(rows, rows_of(recipe, report))
    return Measured(recipe=recipe, spec=DATA, all_rows=rows)


def show(measured: list[Measured], command: str, *, write: bool) -> None:
    """Print the tables, and with ``write`` put them into their pages, those of all models too."""
    for one in measured if write else ():
        home = ROOT / "models" / one.recipe.name
        write_csv(home / "accuracy.csv", one.all_rows)
        plot = IMAGES / f"accuracy-{one.recipe.name}.png"
        draw_table(one.rows(), plot, title=one.recipe.name)
        write_section(home / "README.md", "accuracy", format_card(one, command=command))
    of_all = {one.recipe.name for one in measured} == set(DEMO_MODELS)
    publish("summary", format_front(measured), write=write and of_all)
    publish("paper", format_summary(measured, command=command), write=write and of_all)


def measure(
    name: str, folder: Path, only: list[str], *, samples: int, seed: int, workers: str
) -> Measured:
    """Ask one model everything that ``folder`` has no answer to.

    With ``only`` what other pruners do is as it was published.
    """
    recipe, _ = find_recipe(name)
    served = supported_pruners(recipe)
    pruners = [one for one in served if not only or one in only]
    published = read_csv(ROOT / "models" / name / "accuracy.csv") if only else []

    def run(part: str, some: list[str], keeps: tuple[float, ...], **how: Any) -> list[Row]:
        if not some:
            return []
        misaligned = MISALIGNMENTS if part == "fixed" and not only else ()
        report = ask(
            folder / part,
            ExportOptions(model=name, pruning=PruningRequest(seed=seed)),
            PruningRequest(seed=seed, **how).variants(some, keeps),
            samples=samples,
            asking=Asking(misaligned=misaligned, workers=workers, records=folder / part),
        )
        rows = with_budget(recipe, report, "adaptive" if part == "adaptive" else "fixed")
        return rows if part == "fixed" and not only else [r for r in rows if r["pruner"] != "none"]

    presets = {one: find_preset(one) for one in pruners}
    rows = run("fixed", pruners, KEEPS)
    # What they rank enters in another order even where nothing is dropped.
    rows += run("all-kept", [one for one in pruners if presets[one].order == "score"], (1.0,))
    adaptive = [one for one in pruners if "adaptive" in presets[one].budgets]
    rows += run("adaptive", adaptive, (1.0,), budget="adaptive")
    if not asks_bare(recipe):
        reading = [one for one in pruners if presets[one].pruner.reads_text]
        for text in get_args(PrunerText):
            others = [one for one in reading if presets[one].pruner_text != text]
            rows += run(text, others, TEXT_KEEPS, pruner_text=text)
    return Measured(recipe=recipe, spec=DATA, all_rows=merge_rows(published, rows))


def ask(
    folder: Path,
    options: ExportOptions,
    prunings: Sequence[PruningRequest],
    *,
    samples: int,
    asking: Asking,
) -> Row:
    """JSON form of one evaluation, kept beside its answers."""
    report = evaluate_model(
        options,
        prunings=prunings,
        num_samples=samples,
        asking=asking,
        progress=TerminalProgress(),
    )
    plain: Row = report.to_plain()
    part = folder / "report.part"
    part.write_text(json.dumps(plain, indent=1), encoding="utf-8")
    part.rename(folder / "report.json")
    return plain


def build_command() -> Any:
    """The command that reads the arguments."""
    app = typer.Typer(add_completion=False)
    app.command()(main)
    return typer.main.get_command(app)


if __name__ == "__main__":
    sys.exit(run(command=build_command, program="paper_table.py"))
