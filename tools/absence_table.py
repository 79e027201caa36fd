#!/usr/bin/env python3
"""What tells a demo model's boxes of objects that are there from boxes of those that are not?

    tools/absence_table.py                     prints the table, some minutes on two cores
    tools/absence_table.py --samples 100       quicker and coarser
    tools/absence_table.py --write             puts it into docs/results

Beside the score of an answer: the margin before the runner-up, and whether a
second answer, to other words or with other tokens kept, has the same box. Held-out scenes, and
intervals by a bootstrap over images.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from pages import called_as, note, publish

from gap_export.evaluation.absence import ScoredAnswers, summarize
from gap_export.evaluation.datasets import open_dataset
from gap_export.evaluation.questions import Dataset
from gap_export.exporting import ExportOptions, GraphCache, export_model
from gap_export.parity.metrics import intersection_over_union
from gap_export.runtime.answers import box_tokens
from gap_export.runtime.boxes import parse_answer
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.prompt import PromptEncoder
from gap_export.runtime.session import GroundingSession
from gap_export.spec.positions import PositionRule
from gap_export.spec.requests import PruningRequest

MODELS = ("refshapes-llava", "refshapes-shikra", "refshapes-minigpt-v2")
KEEP_RATIO = 0.3
PRUNERS = ("spatial", "random")
# The share that `eval --absent 0.3` asks.
ABSENT = 0.3
_ARTICLE = "the "


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer, and what its logits say of its box's tokens.

    Attributes:
        grounding: The answer.
        margin: How far behind the most likely box is that differs in one token: 1 less the largest
            quotient of the second and the first probability among the box's tokens; 0 without one.
    """

    grounding: Grounding
    margin: float


class Asker:
    """Asks one bundle in the form whose steps are one token each, and looks at the logits."""

    def __init__(self, bundle: Path, positions: PositionRule) -> None:
        self.session = GroundingSession.open(bundle, form="base", positions=positions)
        self._prompts = PromptEncoder(self.session.manifest, bundle)
        self._gaps: list[float] = []
        decode = self.session.backend.decode

        def spy(feed: Any, cache: Any) -> Any:
            logits = decode(feed, cache)
            second, first = np.partition(logits[0].astype(np.float64), -2)[-2:]
            self._gaps.append(first - second)
            return logits

        self.session.backend.decode = spy  # type: ignore[method-assign]

    def ask(self, dataset: Dataset, *, article: bool = True) -> list[Answer]:
        """Answers to all questions, in the data set's order."""
        return [
            self._ask(one.image.load(), one.expression if article else _without(one.expression))
            for one in dataset.asked
        ]

    def _ask(self, image: Any, expression: str) -> Answer:
        self._gaps.clear()
        found = self.session.ground(image, expression)
        parsed = parse_answer(found.text, self.session.manifest.box)
        if parsed is None or found.score is None:
            return Answer(grounding=found, margin=0.0)
        # The prompt's beginning may have taken steps of its own.
        gaps = self._gaps[-len(found.token_ids) :]
        chosen = box_tokens(found.token_ids, parsed.span, self._prompts.decode)
        of_box = gaps[chosen]
        return Answer(
            grounding=found,
            margin=1 - math.exp(-min(of_box)),
        )


def _without(expression: str) -> str:
    """Other words for the same: every article left out."""
    return expression.replace(_ARTICLE, "")


def main(samples: int = 500, seed: int = 0, write: bool = False) -> None:
    """Measure and print."""
    dataset = open_dataset("refshapes", samples=samples, seed=seed, absent=ABSENT)
    lines = [
        f"{len(dataset.questions)} held-out expressions of objects that are there and "
        f"{len(dataset.absent)} of objects that are not (`--absent {ABSENT:g}`), greedy, keep "
        f"{KEEP_RATIO:g}. False boxes: at the threshold where 95 % of the former are found.",
        "",
        "| model | tokens | what is ranked by | AUROC | false boxes |",
        "|---|---|---|---|---|",
    ]
    for model in MODELS:
        for setting, signal, values in measure(model, dataset):
            scored = ScoredAnswers(
                scores=np.array(values),
                is_there=np.array([one.box is not None for one in dataset.asked]),
                images=tuple(one.image_id for one in dataset.asked),
            )
            found = summarize(scored, seed=seed)
            (low, high), (least, most) = found.auroc_ci95, found.false_box_ci95
            lines.append(
                f"| {model} | {setting} | {signal} | {found.auroc:.3f} ({low:.3f} to {high:.3f}) | "
                f"{100 * found.false_box_rate:.1f} % ({100 * least:.1f} to {100 * most:.1f}) |"
            )
    publish("absence", f"`{called_as('absence_table.py')}`\n\n" + "\n".join(lines), write=write)


def measure(model: str, dataset: Dataset) -> Iterator[tuple[str, str, list[float]]]:
    """Setting, signal, and its value for each question."""
    cache = GraphCache()
    with tempfile.TemporaryDirectory(prefix="gap-export-absence-") as scratch:

        def asker(pruner: str, keep: float, positions: PositionRule = "gap") -> Asker:
            out = Path(scratch) / f"{pruner}-{keep:g}"
            if not out.exists():
                note(f"exporting {model}, {pruner} {keep:g}")
                options = ExportOptions(
                    model=model, out=out, pruning=PruningRequest(pruner=pruner, keep_ratio=keep)
                )
                export_model(options, cache=cache)
            return Asker(out, positions)

        note(f"asking {model}")
        first, second = PRUNERS
        with_gap = asker(first, KEEP_RATIO)
        settings = {
            "all": asker(first, 1.0),
            f"{first}, compact ids": asker(first, KEEP_RATIO, "compact"),
            f"{first}, GAP": with_gap,
        }
        answers = {name: one.ask(dataset) for name, one in settings.items()}
        for name, given in answers.items():
            yield name, "score: probability of the box", [a.grounding.score or 0.0 for a in given]
            yield name, "margin before the runner-up token", [a.margin for a in given]
            other = settings[name].ask(dataset, article=False)
            yield name, "IoU with the answer to the words without articles", _agree(given, other)
        gap = answers[f"{first}, GAP"]
        other = asker(second, KEEP_RATIO).ask(dataset)
        yield f"{first}, GAP", f"IoU with the answer of {second}, GAP", _agree(gap, other)
        yield f"{first}, GAP", "IoU with the answer of all tokens", _agree(gap, answers["all"])


def _agree(one: list[Answer], other: list[Answer]) -> list[float]:
    pairs = ((a.grounding.box, b.grounding.box) for a, b in zip(one, other, strict=True))
    return [0.0 if a is None or b is None else intersection_over_union(a, b) for a, b in pairs]


if __name__ == "__main__":
    typer.run(main)
