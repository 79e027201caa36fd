"""RefShapes-2: what real scenes have and RefShapes has not, drawn on the fly, fully determined.

10 to 25 things of twelve shapes stand in perspective on a floor or hang: the far ones are smaller,
near ones hide parts of those behind them, some reach over the image's border, many look alike,
some have a pattern. Images are 1:2 to 2:1. Expressions add order ("the third cup from the left"),
comparison ("the larger of the two red rings") and nearness to what RefShapes has.

The right box is that of what can be **seen** of a thing: what is neither hidden nor outside the
image, as COCO's boxes are. Half of a thing at least can be seen.

A scene is a function of (split, seed, index) and of nothing else, and the split is part of the
random generator's key: no held-out scene can be met in training, with any seed.

Example:
    >>> scene = generate_scene(split="heldout", seed=0, index=7)
    >>> 10 <= len(scene.objects) <= 25
    True
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gap_export.evaluation.refshapes import AbsentExpression, Expression, Split
from gap_export.evaluation.refshapes.scene_number import MIN_EXPRESSIONS, check_number
from gap_export.evaluation.refshapes2.absent import sample_absent
from gap_export.evaluation.refshapes2.outlines import SHAPES
from gap_export.evaluation.refshapes2.phrases import WORDS, sample_expressions
from gap_export.evaluation.refshapes2.render import render
from gap_export.evaluation.refshapes2.things import CANVASES, Thing, sample_layout

__all__ = [
    "CANVASES",
    "SHAPES",
    "WORDS",
    "Scene",
    "Thing",
    "absent_expressions",
    "generate_scene",
]

# Not RefShapes' own keys: its scenes have nothing to do with these.
_SPLIT_KEYS: dict[Split, int] = {"train": 21, "heldout": 22}
_ABSENT_KEY = 23


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A rendered scene and the expressions that can be asked about it.

    Attributes:
        image: uint8 [height, width, 3], RGB; one of ``CANVASES``.
        objects: From the nearest to the farthest.
        expressions: Different, unambiguous expressions.
        owners: int64 [height, width], index of the object seen at a pixel, or -1.
        index: Index within split and seed.
    """

    image: NDArray[np.uint8]
    objects: tuple[Thing, ...]
    expressions: tuple[Expression, ...]
    owners: NDArray[np.int64]
    split: Split
    seed: int
    index: int


def generate_scene(*, split: Split, seed: int, index: int, num_expressions: int = 8) -> Scene:
    """Build scene number ``index``; the same arguments always give the same bytes.

    Args:
        split: "train" or "heldout".
        seed: Non-negative seed.
        index: Non-negative number of the scene.
        num_expressions: How many expressions to look for, at least 1. Scenes for which fewer
            than min(4, num_expressions) are found are drawn again.

    Raises:
        ValueError: an argument is out of range.
    """
    check_number(split, seed, index, num_expressions)
    rng = np.random.default_rng([_SPLIT_KEYS[split], seed, index])
    while True:
        layout = sample_layout(rng)
        if layout is None:
            continue
        expressions = sample_expressions(rng, layout.things, num_expressions)
        if len(expressions) >= min(MIN_EXPRESSIONS, num_expressions):
            break
    return Scene(
        image=render(rng, layout),
        objects=layout.things,
        expressions=expressions,
        owners=layout.owners,
        split=split,
        seed=seed,
        index=index,
    )


def absent_expressions(scene: Scene, count: int) -> tuple[AbsentExpression, ...]:
    """Expressions that no object of a scene answers to, at most ``count``; see RefShapes' own."""
    key = [_SPLIT_KEYS[scene.split], scene.seed, scene.index, _ABSENT_KEY]
    return sample_absent(np.random.default_rng(key), scene.objects, count)
