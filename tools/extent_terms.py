#!/usr/bin/env python3
"""What the pruner ``extent`` is made of: Acc@0.5 with a term left out, exchanged or added.

tools/extent_terms.py                      all demo models, on RefShapes' training split
tools/extent_terms.py --split heldout --seed 1
tools/extent_terms.py --write              into docs/results/lost.md
"""

from __future__ import annotations

import sys
from typing import Annotated, Literal

import numpy as np
import torch
import typer
from pages import DEMO_MODELS, called_as, note, publish
from pruner_trials.model import TrialModel, hits
from pruner_trials.terms import all_terms
from what_is_lost import KEEPS

from gap_export.families import resolve_pruning
from gap_export.pruning import PRESETS, Preset
from gap_export.spec.requests import PruningRequest

_BESIDE = ("divprune", "text-llm", "cdpruner-llm")


def main(
    model: Annotated[list[str] | None, typer.Argument(help="Demo models; all.")] = None,
    samples: int = 300,
    split: Literal["train", "heldout"] = "train",
    seed: int = 0,
    write: Annotated[bool, typer.Option(help="Put the table into docs/.")] = False,
) -> None:
    """Measure, print, and with --write publish."""
    torch.set_num_threads(1)
    names = model or DEMO_MODELS
    columns = [measure(name, samples=samples, split=split, seed=seed) for name in names]
    heads = [f"{name.removeprefix('refshapes-')} {keep:g}" for keep in KEEPS for name in names]
    lines = [
        f"`{called_as('extent_terms.py')}`: Acc@0.5 in %, {samples} expressions, split {split}, "
        f"seed {seed}.",
        "",
        "| | " + " | ".join([*heads, *(f"mean {keep:g}" for keep in KEEPS)]) + " |",
        "|---|" + "---|" * (len(heads) + len(KEEPS)),
    ]
    for term in columns[0]:
        found = [[column[term][number] for column in columns] for number in range(len(KEEPS))]
        cells = [f"{100 * share:.1f}" for shares in found for share in shares]
        means = [f"**{100 * float(np.mean(shares)):.1f}**" for shares in found]
        lines.append(f"| {term} | " + " | ".join([*cells, *means]) + " |")
    publish("extent", "\n".join(lines), write=write)


def measure(name: str, *, samples: int, split: Literal["train", "heldout"], seed: int) -> dict:
    """Acc@0.5 of each term at each share."""
    found: dict[str, list[float]] = {}
    with TrialModel(name, num_samples=samples, split=split, seed=seed) as model:
        grid = (model.recipe.grid.rows, model.recipe.grid.cols)
        trials = {term: Preset(name="trial", pruner=one) for term, one in all_terms(grid).items()}
        trials |= {f"`{one}`": PRESETS[one] for one in _BESIDE}
        for term, preset in trials.items():
            found[term] = []
            for keep in KEEPS:
                request = PruningRequest(pruner="spatial", keep_ratio=keep)
                spec = resolve_pruning(model.recipe, request)
                kept = model.prune_as(preset, spec)
                found[term].append(float(hits(model.answer(kept), model.samples).mean()))
            note(f"{name} {term}: {found[term]}")
    return found


if __name__ == "__main__":
    sys.exit(typer.run(main))
