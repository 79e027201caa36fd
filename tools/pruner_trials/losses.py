"""What a pruner costs in boxes, and what it dropped that would have said where they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gap_export.evaluation.refshapes import Sample
from pruner_trials.model import Box, Kept, TrialModel, overlap

# What becomes of an answer: right, another object's box, a box of no object, or none.
FATES = ("right", "another object", "wrong extent", "no box")


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Means over the questions; None where there is nothing to take the mean of.

    Attributes:
        fates: Share of each of ``FATES``; the first is Acc@0.5.
        target: Share of the target's tokens that are kept.
        sides: Share of the four sides of a target whose outermost row or column of tokens is kept,
            in part at least.
        ground: Share of the kept tokens that show nothing but the ground.
        size: Of boxes of a wrong extent: median of the root of their area over the true one.
        offset: Of the same: median distance of the centers, in sides of the true box.
        named: Of boxes of another object: how often it is one that the expression's words fit.
    """

    fates: tuple[float, ...]
    target: float
    sides: float
    ground: float
    size: float | None
    offset: float | None
    named: float | None


def measure(model: TrialModel, kept: Sequence[Kept]) -> Loss:
    """Answer with what is kept, and look at what is wrong.

    Args:
        model: With its questions.
        kept: What is left for each.
    """
    boxes = model.answer(kept)
    fates = [_fate(box, sample) for box, sample in zip(boxes, model.samples, strict=True)]
    extents = [
        _size_and_offset(box, sample.box)
        for box, sample, fate in zip(boxes, model.samples, fates, strict=True)
        if fate == "wrong extent" and box is not None
    ]
    named = [
        _nearest(box, sample) in sample.expression.mentioned
        for box, sample, fate in zip(boxes, model.samples, fates, strict=True)
        if fate == "another object" and box is not None
    ]
    seen = [_seen(model, number, one.survivors) for number, one in enumerate(kept)]
    target, sides, ground = np.mean(seen, axis=0).tolist()
    return Loss(
        fates=tuple(fates.count(fate) / len(fates) for fate in FATES),
        target=target,
        sides=sides,
        ground=ground,
        size=float(np.median([size for size, _ in extents])) if extents else None,
        offset=float(np.median([offset for _, offset in extents])) if extents else None,
        named=float(np.mean(named)) if named else None,
    )


def _fate(box: Box | None, sample: Sample) -> str:
    if box is None:
        return "no box"
    if overlap(box, sample.box) > 0.5:
        return "right"
    nearest = sample.scene.objects[_nearest(box, sample)]
    return "another object" if overlap(box, nearest.box) > 0.5 else "wrong extent"


def _nearest(box: Box, sample: Sample) -> int:
    """The object, the target aside, that the box covers best."""
    overlaps = [overlap(box, one.box) for one in sample.scene.objects]
    overlaps[sample.expression.target] = -1.0
    return int(np.argmax(overlaps))


def _size_and_offset(box: Box, truth: Sequence[float]) -> tuple[float, float]:
    side = truth[2] - truth[0]
    size = np.sqrt((box[2] - box[0]) * (box[3] - box[1])) / side
    apart = [(box[i] + box[i + 2] - truth[i] - truth[i + 2]) / 2 for i in (0, 1)]
    return float(size), float(np.hypot(*apart) / side)


def _seen(model: TrialModel, number: int, survivors: NDArray[np.int64]) -> tuple[float, ...]:
    """Shares of the target's tokens and sides that are kept, and of the ground among the kept."""
    owners = model.owners[number]
    is_target = owners == model.samples[number].expression.target
    is_kept = np.isin(np.arange(len(owners)), survivors)
    # Of an image cut into tiles the thumbnail's tokens are larger, and no outermost ones.
    widths = model.corners[:, 2] - model.corners[:, 0]
    is_fine = is_target & (widths < widths.min() + 1e-6)
    sides = []
    for edge, furthest in zip(range(4), (np.min, np.min, np.max, np.max), strict=True):
        places = model.corners[:, edge]
        if is_fine.any():
            is_outermost = is_fine & (places == furthest(places[is_fine]))
            sides.append((is_outermost & is_kept).any())
    return (
        float(is_kept[is_target].mean()) if is_target.any() else 0.0,
        float(np.mean(sides)) if sides else 0.0,
        float((owners[survivors] < 0).mean()),
    )
