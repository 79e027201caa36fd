"""Referring expressions of RefShapes: attribute, superlative and relation, never ambiguous.

An expression is kept only when exactly one object of the scene answers to it, with a margin in
pixels wherever a comparison of places is involved, so that no one has to judge a near tie.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gap_export.evaluation.refshapes.objects import COLORS, SHAPES, SIZES, SceneObject

Kind = Literal["attribute", "superlative", "relation", "ordinal", "comparative"]
"""How a phrase picks out its object; the last two are of RefShapes-2 alone."""

SUPERLATIVES: tuple[str, ...] = ("left-most", "right-most", "top-most", "bottom-most")
RELATIONS: tuple[str, ...] = ("above", "below", "left of", "right of")
SUPERLATIVE_MARGIN = 5.0
RELATION_MARGIN = 8.0

WORDS: tuple[str, ...] = (
    "the",
    "object",
    *SIZES,
    *COLORS,
    *SHAPES,
    *SUPERLATIVES,
    "above",
    "below",
    "left",
    "right",
    "of",
)
"""Closed vocabulary: every expression is these words joined by single spaces."""

_ATTRIBUTE_SHARE = 0.36
_SUPERLATIVE_SHARE = 0.22
_DRAWS_PER_EXPRESSION = 5

# Which attributes a description names, in the order size, color, shape.
_Use = tuple[bool, bool, bool]
_ATTRIBUTE_USES: tuple[_Use, ...] = (
    (False, True, True),
    (False, True, True),
    (False, True, False),
    (False, False, True),
    (True, True, True),
    (True, False, True),
    (True, True, False),
)
_SUPERLATIVE_USES: tuple[_Use, ...] = (
    (False, True, True),
    (False, True, False),
    (False, False, True),
    (False, False, False),
)
_RELATION_USES: tuple[_Use, ...] = _SUPERLATIVE_USES[:3]
_ANCHOR_USE: _Use = (False, True, True)


@dataclass(frozen=True, kw_only=True)
class Expression:
    """A phrase that picks out one object of a scene.

    Attributes:
        text: Words of `WORDS` joined by single spaces.
        target: Index of the object meant.
        kind: How the phrase picks it out.
        mentioned: Indices of all objects that the phrase's descriptions fit, ascending: look-alikes
            and the anchor of a relation included. What a bag-of-words text encoder can point at.
    """

    text: str
    target: int
    kind: Kind
    mentioned: tuple[int, ...] = ()


def describe(item: SceneObject, use: _Use) -> str:
    """Words for an object that name the attributes in `use`, without an article."""
    words: list[str] = [item.size] if use[0] else []
    if use[1]:
        words.append(item.color)
    words.append(item.shape if use[2] else "object")
    return " ".join(words)


def random_attribute_use(rng: np.random.Generator) -> _Use:
    """Draw which attributes a description names."""
    return _ATTRIBUTE_USES[int(rng.integers(0, len(_ATTRIBUTE_USES)))]


def matching(objects: Sequence[SceneObject], like: SceneObject, use: _Use) -> list[int]:
    """Indices of the objects that share the attributes in `use` with `like`."""
    return [
        i
        for i, item in enumerate(objects)
        if (not use[0] or item.size == like.size)
        and (not use[1] or item.color == like.color)
        and (not use[2] or item.shape == like.shape)
    ]


def sample_expressions(
    rng: np.random.Generator, objects: Sequence[SceneObject], count: int
) -> tuple[Expression, ...]:
    """Draw up to `count` different expressions.

    Args:
        rng: Source of randomness; advanced by an amount that depends on `count` alone.
        objects: Objects of the scene, at least one.
        count: How many to look for; a scene with few objects may have fewer.

    Returns:
        Expressions with pairwise different texts.
    """
    found: dict[str, Expression] = {}
    draws = rng.random((count * _DRAWS_PER_EXPRESSION, 5)).tolist()
    for kind_draw, *choices in draws:
        if kind_draw < _ATTRIBUTE_SHARE:
            expression = _attribute(objects, choices)
        elif kind_draw < _ATTRIBUTE_SHARE + _SUPERLATIVE_SHARE:
            expression = _superlative(objects, choices)
        else:
            expression = _relation(objects, choices)
        if expression is not None:
            found.setdefault(expression.text, expression)
            if len(found) == count:
                break
    return tuple(found.values())


def _attribute(objects: Sequence[SceneObject], choices: Sequence[float]) -> Expression | None:
    """The [size] [color] shape-or-object, when only one object fits."""
    target = int(choices[0] * len(objects))
    use = _ATTRIBUTE_USES[int(choices[1] * len(_ATTRIBUTE_USES))]
    if len(matching(objects, objects[target], use)) != 1:
        return None
    text = f"the {describe(objects[target], use)}"
    return Expression(text=text, target=target, kind="attribute", mentioned=(target,))


def _superlative(objects: Sequence[SceneObject], choices: Sequence[float]) -> Expression | None:
    """The extreme one among two or more that fit, ahead of the next by the margin."""
    like = objects[int(choices[0] * len(objects))]
    use = _SUPERLATIVE_USES[int(choices[1] * len(_SUPERLATIVE_USES))]
    direction = int(choices[2] * len(SUPERLATIVES))
    candidates = matching(objects, like, use)
    if len(candidates) < 2:
        return None
    axis, sign = direction // 2, 1 - direction % 2 * 2
    places = sorted((sign * objects[i].center[axis], i) for i in candidates)
    if places[1][0] - places[0][0] < SUPERLATIVE_MARGIN:
        return None
    target = places[0][1]
    text = f"the {SUPERLATIVES[direction]} {describe(objects[target], use)}"
    return Expression(text=text, target=target, kind="superlative", mentioned=tuple(candidates))


def _relation(objects: Sequence[SceneObject], choices: Sequence[float]) -> Expression | None:
    """The one that fits on one side of a uniquely described anchor."""
    target, anchor = int(choices[0] * len(objects)), int(choices[1] * len(objects))
    relation = int(choices[2] * len(RELATIONS))
    use = _RELATION_USES[int(choices[3] * len(_RELATION_USES))]
    if target == anchor or len(matching(objects, objects[anchor], _ANCHOR_USE)) != 1:
        return None
    axis, sign = 1 - relation // 2, 1 - relation % 2 * 2
    limit = sign * objects[anchor].center[axis]
    if limit - sign * objects[target].center[axis] <= RELATION_MARGIN:
        return None
    candidates = matching(objects, objects[target], use)
    others = (i for i in candidates if i not in (target, anchor))
    if any(sign * objects[i].center[axis] <= limit for i in others):
        return None
    text = (
        f"the {describe(objects[target], use)} {RELATIONS[relation]} "
        f"the {describe(objects[anchor], _ANCHOR_USE)}"
    )
    mentioned = tuple(sorted({*candidates, anchor}))
    return Expression(text=text, target=target, kind="relation", mentioned=mentioned)
