#!/usr/bin/env python3
"""What pruning costs in boxes, and why: for each demo model, pruner and share of tokens kept.

Nothing is exported for a pruner: the tower sees each image once, tokens are chosen of what it saw
by the package's own pruners, and the answers are decoded greedily in PyTorch, with GAP.

    tools/what_is_lost.py                              all demo models
    tools/what_is_lost.py refshapes-llava --samples 500
    tools/what_is_lost.py --write                      into docs/results/lost.md, with plots

    tools/what_is_lost.py --counted --write            the page's second table instead

"Counted" is no way to run a pruned model: each kept token is fed as many times as there were tokens
for it, at the same ids, which adds the log of that number to what attention makes of it. It tells
what is lost with the dropped tokens from what is lost because so few are left to look at.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pages import IMAGES, called_as, note, percent, publish
from pruner_trials.losses import FATES, Loss, measure
from pruner_trials.model import TrialModel, hits

from gap_export.families import supported_pruners
from gap_export.pruning import PRESETS
from gap_export.report.figures import BLUE, GRID, INK, STYLE, VERMILLION
from gap_export.spec.recipe import find_recipe

MODELS = (
    "refshapes-llava",
    "refshapes-shikra",
    "refshapes-minigpt-v2",
    "refshapes-qwen3-vl",
    "refshapes-internvl",
)
KEEPS = (0.3, 0.1)
_COUNTED = ("extent", "extent-llm", "divprune", "cdpruner-llm")
_COLORS = (BLUE, VERMILLION, "#e6b800", "#999999")

Losses = dict[tuple[str, float], Loss]


def main(
    model: Annotated[list[str] | None, typer.Argument(help="Demo models; all.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out expressions.")] = 200,
    seed: int = 0,
    threads: Annotated[int, typer.Option(min=1, help="Of PyTorch.")] = 1,
    counted: Annotated[bool, typer.Option(help="What is lost for want of attention.")] = False,
    write: Annotated[bool, typer.Option(help="Put page and plots into docs/.")] = False,
) -> None:
    """Measure, print, and with --write publish."""
    torch.set_num_threads(threads)
    if counted:
        publish("counted", count(model or MODELS, samples=samples, seed=seed), write=write)
        return
    parts = [f"`{called_as('what_is_lost.py')}`: {samples} held-out expressions, seed {seed}."]
    for name in model or MODELS:
        losses = lose(name, samples=samples, seed=seed)
        parts.append(format_model(name, losses))
        if write:
            draw(losses, IMAGES / f"lost-{name}.png", title=name)
    publish("lost", "\n\n".join(parts), write=write)


def lose(name: str, *, samples: int, seed: int) -> Losses:
    """Every pruner of the package that the model serves, at each share."""
    found: Losses = {}
    with TrialModel(name, num_samples=samples, split="heldout", seed=seed) as model:
        for pruner in supported_pruners(find_recipe(name)[0]):
            if pruner not in PRESETS:
                continue
            for keep in KEEPS:
                found[pruner, keep] = measure(model, model.prune(PRESETS[pruner], keep))
                note(f"{name} {pruner} {keep:g}: {percent(found[pruner, keep].fates[0])}")
    return found


def count(names: Sequence[str], *, samples: int, seed: int) -> str:
    """Acc@0.5 as it is, and where tokens are counted: a row a pruner and share."""
    rows: dict[tuple[str, float], list[str]] = {}
    for name in names:
        with TrialModel(name, num_samples=samples, split="heldout", seed=seed) as model:
            for pruner, keep in product(_COUNTED, KEEPS):
                kept = model.prune(PRESETS[pruner], keep)
                copies = round(model.owners.shape[1] / len(kept[0].keep_indices))
                shares = [
                    float(hits(model.answer(kept, copies=times), model.samples).mean())
                    for times in (1, copies)
                ]
                cell = f"{percent(shares[0])}, counted **{percent(shares[1])}**"
                rows.setdefault((pruner, keep), []).append(cell)
                note(f"{name} {pruner} {keep:g}: {cell}")
    lines = [
        f"`{called_as('what_is_lost.py')}`: {samples} held-out expressions, seed {seed}.",
        "",
        f"| pruner | keep | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    lines += [f"| `{p}` | {keep:g} | {' | '.join(cells)} |" for (p, keep), cells in rows.items()]
    return "\n".join(lines)


def format_model(name: str, losses: Losses) -> str:
    """A section: one table, one plot."""
    lines = [
        f"## {name}",
        "",
        "| pruner | keep | Acc@0.5 | another object (named) | wrong extent: size, offset "
        "| no box | target kept | its sides | ground |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (pruner, keep), loss in losses.items():
        right, another, extent, none = (percent(share) for share in loss.fates)
        named = "" if loss.named is None else f" ({percent(loss.named)})"
        size = "" if loss.size is None else f": {loss.size:.2f}, {loss.offset:.2f}"
        lines.append(
            f"| `{pruner}` | {keep:g} | **{right}** | {another}{named} "
            f"| {extent}{size} | {none} | {percent(loss.target)} | {percent(loss.sides)} "
            f"| {percent(loss.ground)} |"
        )
    alt = f"{name}: what becomes of the answers, a bar a pruner"
    return "\n".join([*lines, "", f"![{alt}](../images/lost-{name}.png)"])


def draw(losses: Losses, path: Path, *, title: str) -> None:
    """What becomes of the answers: a bar a pruner, a panel a share of tokens."""
    pruners = list(dict.fromkeys(pruner for pruner, _ in losses))
    with rc_context(STYLE):
        figure = Figure(figsize=(9.6, 1.2 + 0.24 * len(pruners)), layout="constrained")
        FigureCanvasAgg(figure)
        panels: Any = figure.subplots(1, len(KEEPS), sharey=True)
        for panel, keep in zip(panels, KEEPS, strict=True):
            left = [0.0] * len(pruners)
            for fate, color in enumerate(_COLORS):
                shares = [100 * losses[pruner, keep].fates[fate] for pruner in pruners]
                panel.barh(pruners, shares, left=left, color=color, label=FATES[fate])
                left = [start + share for start, share in zip(left, shares, strict=True)]
            panel.set_title(f"keep {keep:g}", fontsize=10)
            panel.set_xlabel("% of the answers")
            panel.set_xlim(0, 100)
            panel.grid(axis="x", color=GRID, linewidth=0.6)
        panels[0].invert_yaxis()
        figure.suptitle(f"{title}: what becomes of the answers, with GAP", color=INK)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(typer.run(main))
