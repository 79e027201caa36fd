"""Expressions of RefShapes-2 to which a scene has no thing; kinds are those of RefShapes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from itertools import product

import numpy as np

from gap_export.evaluation.refshapes import AbsentExpression
from gap_export.evaluation.refshapes.absent import take_turns
from gap_export.evaluation.refshapes.objects import SIZES
from gap_export.evaluation.refshapes2.outlines import SHAPES
from gap_export.evaluation.refshapes2.phrases import (
    PLACE_MARGIN,
    SIDE_RELATIONS,
    Description,
    Phrase,
    Reading,
    ahead,
    fitting,
    pick,
    readings,
)
from gap_export.evaluation.refshapes2.things import Thing


def sample_absent(
    rng: np.random.Generator, things: Sequence[Thing], count: int
) -> tuple[AbsentExpression, ...]:
    """Draw up to ``count`` different ones, the kinds taking turns.

    Args:
        rng: Source of randomness; advanced by an amount that depends on ``count`` alone.
        things: Of the scene, at least one.
        count: How many to look for.
    """
    return take_turns(
        rng,
        {
            "absent object": partial(_absent_object, things),
            "wrong color": partial(_wrong_color, things),
            "wrong relation": partial(_wrong_relation, things),
        },
        count,
    )


def _absent_object(things: Sequence[Thing], choices: Sequence[float]) -> str:
    """A thing of a shape that is not there, in a color that is; half of them name a size."""
    there = {thing.shape for thing in things}
    what = Description(
        size=pick((None, None, *SIZES), choices[3]),
        color=pick([thing.color for thing in things], choices[1]),
        shape=pick([shape for shape in SHAPES if shape not in there], choices[0]),
    )
    return Phrase(kind="attribute", what=what).text()


def _wrong_color(things: Sequence[Thing], choices: Sequence[float]) -> str | None:
    """A shape that is there, in a color that others have and none of that shape."""
    shape = pick([thing.shape for thing in things], choices[0])
    own = {thing.color for thing in things if thing.shape == shape}
    others = sorted({thing.color for thing in things} - own)
    if not others:
        return None
    what = Description(color=pick(others, choices[1]), shape=shape)
    return Phrase(kind="attribute", what=what).text()


def _wrong_relation(things: Sequence[Thing], choices: Sequence[float]) -> str | None:
    """A thing said to be on a side of an anchor on which none like it is, nor nearly."""
    looks = Counter(Description(color=thing.color, shape=thing.shape) for thing in things)
    anchors = [look for look, number in looks.items() if number == 1]
    if not anchors:
        return None
    anchor = pick(anchors, choices[0])
    phrases = [
        phrase
        for what, relation in product(looks, SIDE_RELATIONS)
        if what != anchor
        for phrase in [Phrase(kind="relation", what=what, relation=relation, anchor=anchor)]
        if all(_is_nowhere(things, phrase, way) for way in readings(things))
    ]
    return pick(phrases, choices[1]).text() if phrases else None


def _is_nowhere(things: Sequence[Thing], phrase: Phrase, way: Reading) -> bool:
    """Whether all things of a kind are clearly on the other side of the anchor."""
    assert phrase.anchor is not None and phrase.relation is not None, "it names a relation"
    (anchor,) = fitting(things, phrase.anchor, way)
    return all(
        ahead(phrase.relation, anchor, i, way) < -PLACE_MARGIN
        for i in fitting(things, phrase.what, way)
    )
