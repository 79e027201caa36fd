#!/usr/bin/env python3
"""What pruning costs in boxes, and why: for each demo model, pruner and share of tokens kept.

Nothing is exported for a pruner: the tower sees each image once, tokens are chosen of what it saw
by the package's own pruners, and the answers are decoded greedily in PyTorch, with GAP.

    tools/what_is_lost.py                              all demo models
    tools/what_is_lost.py refshapes-llava --samples 500
    tools/what_is_lost.py --write                      into docs/results/lost.md, with plots

    tools/what_is_lost.py --counted --write            the page's second table instead

"Counted" is proportional attention, and tells what is lost with the dropped tokens from what is
lost because so few are left to look at. Beside it stands a finer way to count that was tried: each
dropped token is counted with the kept one that is nearest in the image.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pages import DEMO_MODELS, IMAGES, called_as, note, percent, publish
from pruner_trials.losses import FATES, Loss, measure
from pruner_trials.model import Kept, TrialModel, hits

from gap_export.families import supported_pruners
from gap_export.pruning import PRESETS
from gap_export.report.figures import BLUE, GRID, INK, STYLE, VERMILLION
from gap_export.spec.proportional import spread_counts
from gap_export.spec.recipe import find_recipe

KEEPS = (0.3, 0.1)
_COUNTED = ("random", "divprune", "extent", "extent-llm", "cdpruner-llm")
_COUNTED_KEEPS = (0.3, 0.1, 0.05)
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
        publish("counted", count(model or DEMO_MODELS, samples=samples, seed=seed), write=write)
        return
    parts = [f"`{called_as('what_is_lost.py')}`: {samples} held-out expressions, seed {seed}."]
    for name in model or DEMO_MODELS:
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
    """Acc@0.5 by how tokens are counted: a row a pruner and share."""
    rows: dict[tuple[str, float], list[str]] = {}
    for name in names:
        with TrialModel(name, num_samples=samples, split="heldout", seed=seed) as model:
            ways = [None, partial(count_evenly, model), partial(count_nearest, model)]
            if model.num_tiles > 1:
                # What is near in an image lies in several tiles.
                del ways[2]
            for pruner, keep in product(_COUNTED, _COUNTED_KEEPS):
                kept = model.prune(PRESETS[pruner], keep)
                shares = [hits(model.answer(kept, count=way), model.samples) for way in ways]
                plain, even, *nearest = (percent(float(share.mean())) for share in shares)
                cell = " / ".join([plain, f"**{even}**", *nearest])
                rows.setdefault((pruner, keep), []).append(cell)
                note(f"{name} {pruner} {keep:g}: {cell}")
    lines = [
        f"`{called_as('what_is_lost.py')}`: {samples} held-out expressions, seed {seed}. A token "
        "counts as one / **as N/K** / as all that are nearest to it (unless there are tiles).",
        "",
        f"| pruner | keep | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
    ]
    lines += [f"| `{p}` | {keep:g} | {' | '.join(cells)} |" for (p, keep), cells in rows.items()]
    return "\n".join(lines)


def count_evenly(model: TrialModel, kept: Kept) -> NDArray[np.int64]:
    """What `--attention proportional` does."""
    return spread_counts(model.owners.shape[1], len(kept.keep_indices))


def count_nearest(model: TrialModel, kept: Kept) -> NDArray[np.int64]:
    """How many cells of the grid are nearer to a kept token than to the others."""
    cols = model.recipe.grid.cols
    cells, left = (
        np.stack(np.divmod(places, cols), axis=-1)
        for places in (np.arange(model.owners.shape[1]), kept.keep_indices)
    )
    distance = ((cells[:, None] - left[None]) ** 2).sum(axis=-1)
    return np.bincount(distance.argmin(axis=1), minlength=len(left))


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
