#!/usr/bin/env python3
"""Methods of other papers beside our own: Acc@0.5 of each demo model, with GAP.

    tools/literature_table.py                      all demo models
    tools/literature_table.py refshapes-llava --samples 1000
    tools/literature_table.py --write              into docs/results/lost.md

What a model is measured to keep is a file below ``--results``: started again, the tool takes it as
it is, so that models may be measured one by one.

The last row is what arXiv 2605.13178 says of OpenAI's CLIP: tokens that fit the text least.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from pages import DEMO_MODELS, called_as, note, publish
from pruner_trials.model import TrialModel, hits
from what_is_lost import KEEPS

from gap_export.evaluation.statistics import bootstrap_interval
from gap_export.families import supported_pruners
from gap_export.pruning import PRESETS, Preset, VisionState
from gap_export.pruning.text import TextPruner

_PRUNERS = (
    *("d2pruner", "d2pruner-llm", "nuwa", "nuwa-received"),
    *("ivc-extent", "ivc-text-llm", "litelvlm"),
    *("extent", "text-llm", "divprune", "cdpruner-llm", "fastervlm", "fastervlm-received", "text"),
)
_INVERTED = "`text`, sign inverted"


class _Inverted(TextPruner):
    """The tokens that fit the text least."""

    def scores(self, state: VisionState) -> torch.Tensor:
        return -super().scores(state)


def main(
    model: Annotated[list[str] | None, typer.Argument(help="Demo models; all.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out expressions.")] = 500,
    seed: int = 0,
    results: Path = Path("literature-results"),
    write: Annotated[bool, typer.Option(help="Put the table into docs/.")] = False,
) -> None:
    """Measure, print, and with --write publish."""
    torch.set_num_threads(1)
    names = model or DEMO_MODELS
    found: dict[str, dict[str, list[str]]] = {}
    results.mkdir(exist_ok=True)
    for name in names:
        kept = results / f"{name}-{samples}-{seed}.json"
        if not kept.exists():
            measured = measure(name, samples=samples, seed=seed)
            kept.write_text(json.dumps(measured, indent=1), encoding="utf-8")
        found[name] = json.loads(kept.read_text(encoding="utf-8"))
    heads = [f"{name.removeprefix('refshapes-')} {keep:g}" for keep in KEEPS for name in names]
    lines = [
        f"`{called_as('literature_table.py')}`: Acc@0.5 in % and its 95 % interval by a bootstrap "
        f"over images, {samples} held-out expressions, seed {seed}.",
        "",
        "| | " + " | ".join(heads) + " |",
        "|---|" + "---|" * len(heads),
    ]
    for row in dict.fromkeys(row for rows in found.values() for row in rows):
        cells = [
            found[name][row][number] if row in found[name] else ""
            for number in range(len(KEEPS))
            for name in names
        ]
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    publish("literature", "\n".join(lines), write=write)


def measure(name: str, *, samples: int, seed: int) -> dict[str, list[str]]:
    """A cell a share of tokens, of each pruner that the model serves."""
    found: dict[str, list[str]] = {}
    with TrialModel(name, num_samples=samples, split="heldout", seed=seed) as model:
        served = supported_pruners(model.recipe)
        presets = {f"`{one}`": PRESETS[one] for one in _PRUNERS if one in served}
        if "text" in served:
            presets[_INVERTED] = replace(PRESETS["text"], pruner=_Inverted())
        for row, preset in presets.items():
            found[row] = [_cell(model, preset, keep) for keep in KEEPS]
            note(f"{name} {row}: {found[row]}")
    return found


def _cell(model: TrialModel, preset: Preset, keep: float) -> str:
    answers = model.answer(model.prune(preset, keep))
    right = hits(answers, model.samples).astype(np.float64)
    images = [str(sample.scene.index) for sample in model.samples]
    low, high = bootstrap_interval(right, images, seed=0)
    return f"**{100 * right.mean():.1f}** {100 * low:.0f}-{100 * high:.0f}"


if __name__ == "__main__":
    sys.exit(typer.run(main))
