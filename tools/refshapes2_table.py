#!/usr/bin/env python3
"""The demo models on RefShapes-2, which none of them has seen: unpruned, and with each pruner.

    tools/refshapes2_table.py                      all demo models, about two hours on one core
    tools/refshapes2_table.py refshapes-llava --samples 200
    tools/refshapes2_table.py --write              into docs/results/refshapes-2.md

Answers are kept below ``--results`` as they come: started again, it asks what is not answered yet,
and takes a model's finished report as it is.
Ranks on RefShapes are those of models/*/accuracy.csv.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from pages import DEMO_MODEL, DEMO_MODELS, ROOT, interval, percent, publish
from paper_report.measured import Measured, Row, read_csv
from paper_table import ask

from gap_export.cli import main as run
from gap_export.evaluation.datasets import open_dataset
from gap_export.evaluation.evaluate import Asking
from gap_export.evaluation.protocols import resolve_protocol
from gap_export.evaluation.records import Record
from gap_export.evaluation.refshapes import WORDS
from gap_export.evaluation.run import make_folder
from gap_export.evaluation.statistics import bootstrap_interval
from gap_export.exporting import ExportOptions
from gap_export.families import supported_pruners
from gap_export.parity.metrics import paired_difference_interval
from gap_export.spec.recipe import find_recipe
from gap_export.spec.requests import PruningRequest

DATA = "refshapes-2"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One judged answer.

    Attributes:
        image: Id of the image.
        knows_words: All words of the expression are RefShapes', so the model knows them.
        right: By the protocol of the report.
    """

    image: str
    knows_words: bool
    right: bool


# By setting and question.
Rights = dict[str, dict[str, Answer]]
KEEP = 0.3
PRUNERS = (
    *("random", "spatial", "divprune", "extent", "extent-llm", "cdpruner-llm", "text-llm"),
    *("fastervlm", "fastervlm-received"),
)


def main(
    model: Annotated[list[str] | None, typer.Argument(help="Demo models; all.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Half of them of all but llava.")] = 1000,
    seed: int = 0,
    workers: Annotated[str, typer.Option(help="As of gap-export eval.")] = "1",
    results: Path = Path("refshapes2-results"),
    write: Annotated[bool, typer.Option(help="Put the page into docs/.")] = False,
) -> None:
    """Measure what is not measured yet, and write the page."""
    reports, rights = {}, {}
    for name in model or DEMO_MODELS:
        num_samples = samples if name == DEMO_MODEL else max(1, samples // 2)
        folder = results / f"{name}-{num_samples}-{seed}"
        make_folder(folder, "results")
        served = supported_pruners(find_recipe(name)[0])
        finished = folder / "report.json"
        if finished.exists():
            reports[name] = json.loads(finished.read_text(encoding="utf-8"))
        else:
            reports[name] = ask(
                folder,
                ExportOptions(model=name, pruning=PruningRequest(seed=seed)),
                PruningRequest(seed=seed).variants([p for p in PRUNERS if p in served], (KEEP,)),
                samples=num_samples,
                asking=Asking(data=DATA, workers=workers, records=folder),
            )
        rights[name] = judge(reports[name], folder)
    # Where the answers are kept changes no figure.
    asked = " ".join(["tools/refshapes2_table.py", *(model or ()), f"--samples {samples}"])
    parts = [f"`{asked} --seed {seed}`", format_overview(reports, rights)]
    parts.append(format_shares(reports))
    parts += [format_model(name, report, rights[name]) for name, report in reports.items()]
    publish("refshapes-2", "\n\n".join(parts), write=write)


def judge(report: Row, folder: Path) -> Rights:
    """By setting which expressions were answered rightly, as the report's protocol has it.

    Raises:
        SystemExit: it is not what the report says.
    """
    questions = {
        one.id: one
        for one in open_dataset(
            DATA, samples=report["data"]["num_expressions"], seed=report["seed"]
        ).questions
    }
    box_spec = find_recipe(report["model"])[0].box
    protocol = resolve_protocol(report["protocol"], None, box_spec)
    rights: Rights = {}
    for path in folder.glob("*.jsonl"):
        header, *lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        records = [Record(**line) for line in lines]
        rights[header["setting"]] = {
            one.question_id: Answer(
                image=questions[one.question_id].image_id,
                knows_words=set(WORDS).issuperset(questions[one.question_id].expression.split()),
                right=protocol.is_hit(protocol.iou(one, questions[one.question_id], box_spec)),
            )
            for one in records
        }
    for row in report["rows"]:
        found = [one.right for one in rights[row["name"]].values()]
        if sum(found) != round(row["acc_at_50"] * row["n"]):
            raise SystemExit(f"{row['name']}: {sum(found)} of {row['n']} answers are right here")
    return rights


def format_overview(reports: Mapping[str, Row], rights: Mapping[str, Rights]) -> str:
    """A line a model: unpruned on both sets, and by kind of expression."""
    kinds = sorted({kind for report in reports.values() for kind in unpruned(report)["by_kind"]})
    lines = [
        f"| model | RefShapes | RefShapes-2 | of known words | {' | '.join(kinds)} |",
        "|---" * (4 + len(kinds)) + "|",
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
            f"({interval(whole['ci95'])}) | {format_known(rights[name][whole['name']])} "
            f"| {' | '.join(cells)} |"
        )
    return "\n".join(["Unpruned:", "", *lines])


def format_shares(reports: Mapping[str, Row]) -> str:
    """What GAP brings back with each pruner, a column a model, best on average first."""
    shares = {
        pruner: {
            name: row["recovered"]
            for name, report in reports.items()
            for row in report["rows"]
            if (row["pruner"], row["positions"]) == (pruner, "gap") and row["recovered"] is not None
        }
        for pruner in PRUNERS
    }
    lines = [
        f"With GAP at keep {KEEP:g}, of the unpruned accuracy:",
        "",
        f"| pruner | {' | '.join(reports)} | mean |",
        "|---" * (2 + len(reports)) + "|",
    ]
    means = {pruner: sum(of.values()) / len(of) for pruner, of in shares.items() if of}
    for pruner in sorted(means, key=lambda one: -means[one]):
        cells = [percent(shares[pruner][n]) if n in shares[pruner] else "" for n in reports]
        mean = percent(means[pruner]) if len(shares[pruner]) == len(reports) else ""
        lines.append(f"| `{pruner}` | {' | '.join(cells)} | {mean} |")
    return "\n".join(lines)


def format_known(answers: Mapping[str, Answer]) -> str:
    """Accuracy, interval and number of the expressions of words that the models know."""
    some = [one for one in answers.values() if one.knows_words]
    values = np.array([one.right for one in some], np.float64)
    ends = bootstrap_interval(values, [one.image for one in some], seed=0)
    return f"{percent(float(values.mean()))} ({interval(list(ends))}; n {len(some)})"


def format_difference(best: Mapping[str, Answer], other: Mapping[str, Answer]) -> tuple[str, bool]:
    """How far another setting is behind the best, paired, and whether the interval says it is."""
    pairs = Counter((answer.right, other[name].right) for name, answer in best.items())
    counts = [pairs[key] for key in ((True, True), (True, False), (False, True), (False, False))]
    low, high = paired_difference_interval(*counts)
    behind = (counts[1] - counts[2]) / sum(counts)
    return f"{100 * behind:.1f} ({100 * low:.1f} to {100 * high:.1f})", low > 0


def format_model(name: str, report: Row, rights: Rights) -> str:
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
        "| pruner | compact | GAP | of the unpruned | points behind the best, paired "
        f"| GAP, of known words | rank of {len(both)} | on RefShapes: rank | GAP |",
        "|---" * 9 + "|",
    ]
    best = max(gap.values(), key=lambda row: row["acc_at_50"])
    num_behind = 0
    for pruner, row in sorted(gap.items(), key=lambda item: -item[1]["acc_at_50"]):
        share = "" if row["recovered"] is None else percent(row["recovered"])
        known = ["", "not measured", ""]
        if pruner in both:
            known = [f"{here[pruner]:g}", f"{there[pruner]:g}", percent(easy[pruner])]
        behind, is_behind = format_difference(rights[best["name"]], rights[row["name"]])
        num_behind += is_behind
        lines.append(
            f"| `{pruner}` | {percent(compact[pruner]['acc_at_50'])} "
            f"({interval(compact[pruner]['ci95'])}) | **{percent(row['acc_at_50'])}** "
            f"({interval(row['ci95'])}) | {share} | {'' if row is best else behind} "
            f"| {format_known(rights[row['name']])} | {' | '.join(known)} |"
        )
    agreement = np.corrcoef([(here[p], there[p]) for p in both], rowvar=False)[0, 1]
    lines += [
        "",
        f"{num_behind} of {len(gap) - 1} others are behind the best by a paired interval "
        f"without 0. The rank correlation (Spearman's) with RefShapes is {agreement:.2f}, "
        f"over {len(both)} pruners.",
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
