"""Expressions of RefShapes to which a scene has no object: right words, nothing there.

Each is made of words that the scene's own expressions use, and none is a near miss: attributes are
names, and where places are compared no object is near the border that would make it the one meant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from gap_export.evaluation.refshapes.expressions import (
    RELATION_MARGIN,
    RELATIONS,
    describe,
    matching,
)
from gap_export.evaluation.refshapes.objects import COLORS, SHAPES, SIZES, SceneObject

AbsentKind = Literal["absent object", "wrong color", "wrong relation"]
ABSENT_KINDS: tuple[AbsentKind, ...] = ("absent object", "wrong color", "wrong relation")
_DRAWS_PER_EXPRESSION = 12
_NAMED = (False, True, True)
Maker = Callable[[Sequence[float]], str | None]
"""From four numbers of [0, 1) to a text; None where the scene has none of that kind for them."""


@dataclass(frozen=True, kw_only=True)
class AbsentExpression:
    """A phrase that no object of a scene answers to.

    Attributes:
        text: Words of ``WORDS`` joined by single spaces.
        kind: ``absent object``: no object has the shape named; ``wrong color``: one has, in other
            colors; ``wrong relation``: object and anchor are there, in another relation.
    """

    text: str
    kind: AbsentKind


def sample_absent(
    rng: np.random.Generator, objects: Sequence[SceneObject], count: int
) -> tuple[AbsentExpression, ...]:
    """Draw up to `count` different ones, the kinds taking turns.

    Args:
        rng: Source of randomness; advanced by an amount that depends on `count` alone.
        objects: Objects of the scene, at least one.
        count: How many to look for; a scene of one object has no wrong relation.
    """
    return take_turns(rng, {kind: partial(make, objects) for kind, make in _MAKERS.items()}, count)


def take_turns(
    rng: np.random.Generator, makers: Mapping[AbsentKind, Maker], count: int
) -> tuple[AbsentExpression, ...]:
    """Draw up to `count` different expressions, the kinds taking turns.

    Args:
        rng: Source of randomness; advanced by an amount that depends on `count` alone.
        makers: Of all kinds.
        count: How many to look for.
    """
    draws = rng.random((count * _DRAWS_PER_EXPRESSION, 4)).tolist()
    # Which kind begins differs by scene, so that a few of each scene are of all kinds.
    turn = int(draws[0][3] * len(ABSENT_KINDS)) if draws else 0
    found: dict[str, AbsentExpression] = {}
    for number, choices in enumerate(draws):
        kind = ABSENT_KINDS[(turn + len(found) + number // count) % len(ABSENT_KINDS)]
        text = makers[kind](choices)
        if text is not None:
            found.setdefault(text, AbsentExpression(text=text, kind=kind))
            if len(found) == count:
                break
    return tuple(found.values())


def _pick(names: Sequence[str], choice: float) -> str:
    return names[int(choice * len(names))]


def _absent_object(objects: Sequence[SceneObject], choices: Sequence[float]) -> str | None:
    """The [size] [color] shape of a shape that is not there, in a color that is."""
    shapes = [shape for shape in SHAPES if all(item.shape != shape for item in objects)]
    if not shapes:
        return None
    # Half of them name a size.
    size = ("", "", *(f"{name} " for name in SIZES))[int(choices[3] * 4)]
    color = _pick([item.color for item in objects], choices[1])
    return f"the {size}{color} {_pick(shapes, choices[0])}"


def _wrong_color(objects: Sequence[SceneObject], choices: Sequence[float]) -> str | None:
    """The color shape of a shape that is there, in a color that none of that shape has."""
    shape = _pick([item.shape for item in objects], choices[0])
    own = {item.color for item in objects if item.shape == shape}
    # Colors of other objects come first: then each word by itself is right.
    there = sorted({item.color for item in objects} - own)
    color = _pick(there or [one for one in COLORS if one not in own], choices[1])
    return f"the {color} {shape}"


def _wrong_relation(objects: Sequence[SceneObject], choices: Sequence[float]) -> str | None:
    """An object said to be on a side of an anchor on which none like it is."""
    target, anchor = int(choices[0] * len(objects)), int(choices[1] * len(objects))
    relation = int(choices[2] * len(RELATIONS))
    if target == anchor or len(matching(objects, objects[anchor], _NAMED)) != 1:
        return None
    axis, sign = 1 - relation // 2, 1 - relation % 2 * 2
    limit = sign * objects[anchor].center[axis] + RELATION_MARGIN
    like = matching(objects, objects[target], _NAMED)
    if any(sign * objects[i].center[axis] <= limit for i in like if i != anchor):
        return None
    described = describe(objects[target], _NAMED), describe(objects[anchor], _NAMED)
    return f"the {described[0]} {RELATIONS[relation]} the {described[1]}"


_MAKERS: dict[AbsentKind, Callable[[Sequence[SceneObject], Sequence[float]], str | None]] = {
    "absent object": _absent_object,
    "wrong color": _wrong_color,
    "wrong relation": _wrong_relation,
}
