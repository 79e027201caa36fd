"""Referring expressions of RefShapes-2, and what they mean.

An expression is kept only if it picks out the same thing in every reading of a scene: whether one
compares what is seen of things or the whole of them, and whether a thing that is neither clearly
small nor clearly big counts as the one or as the other. Wherever a comparison decides, it does so
by a margin. So no one has to judge a near tie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Literal, TypeVar

import numpy as np

from gap_export.evaluation.refshapes import Expression, Kind
from gap_export.evaluation.refshapes.objects import COLORS, SIZES
from gap_export.evaluation.refshapes2.outlines import SHAPES
from gap_export.evaluation.refshapes2.things import BORDERS, PATTERNS, Box, Thing

PLACE_MARGIN = 8.0
"""Pixels by which one center is further than another."""
SIZE_MARGIN = 1.25
"""The factor by which one thing is longer than another, or farther away."""

Key = Literal["left", "right", "top", "bottom", "largest", "smallest"]
Relation = Literal["left of", "right of", "above", "below", "nearest to"]
SIDES: tuple[Key, ...] = ("left", "right", "top", "bottom")
KEYS: tuple[Key, ...] = (*SIDES, "largest", "smallest")
SIDE_RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
RELATIONS: tuple[Relation, ...] = (*SIDE_RELATIONS, "nearest to")
RANKS: dict[int, str] = {2: "second", 3: "third", 4: "fourth"}
OF_TWO: dict[Key, str] = {
    "left": "left",
    "right": "right",
    "top": "upper",
    "bottom": "lower",
    "largest": "larger",
    "smallest": "smaller",
}
PLURALS: dict[str, str] = {
    name: f"{name}es" if name.endswith("s") else f"{name}s" for name in ("object", *SHAPES)
}

WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            *("the", "object", *SIZES, *PATTERNS, *COLORS, *SHAPES),
            *(f"{side}-most" for side in SIDES),
            *("largest", "smallest", *RANKS.values(), "from", "left", "right", "top", "bottom"),
            *(*OF_TWO.values(), "of", "two", *PLURALS.values(), "above", "below", "nearest", "to"),
        )
    )
)
"""Closed vocabulary: every expression is these words joined by single spaces."""

# Kinds that seldom pick out one thing are tried more often: a data set has about as many of each.
_SHARES: dict[Kind, float] = {
    "attribute": 0.14,
    "superlative": 0.05,
    "ordinal": 0.11,
    "comparative": 0.23,
    "relation": 0.47,
}
_DRAWS_PER_EXPRESSION = 30
_Named = TypeVar("_Named")
# Which of size, pattern, color and shape a description names.
_Use = tuple[bool, bool, bool, bool]
_USES: tuple[_Use, ...] = (
    (False, False, True, True),
    (False, False, True, True),
    (False, False, True, False),
    (False, False, False, True),
    (False, False, False, True),
    (True, False, True, False),
    (True, False, False, True),
    (False, True, False, True),
    (False, True, True, False),
    (True, False, True, True),
)


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a noun phrase names of a thing; None: nothing of that kind."""

    size: str | None = None
    pattern: str | None = None
    color: str | None = None
    shape: str | None = None

    def words(self, *, plural: bool = False) -> str:
        """In order, without an article."""
        noun = self.shape or "object"
        named = (self.size, self.pattern, self.color, PLURALS[noun] if plural else noun)
        return " ".join(word for word in named if word is not None)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One way to look at a scene.

    Attributes:
        boxes: One a thing: those of what is seen, or those of whole things.
        border: Side from which on a thing is big.
    """

    boxes: Sequence[Box]
    border: float

    def side(self, index: int) -> float:
        """The longer side of a thing, pixels."""
        x1, y1, x2, y2 = self.boxes[index]
        return float(max(x2 - x1, y2 - y1))

    def center(self, index: int) -> tuple[float, float]:
        """Center of a thing, pixels."""
        x1, y1, x2, y2 = self.boxes[index]
        return (x1 + x2) / 2, (y1 + y2) / 2


@dataclass(frozen=True, kw_only=True)
class Phrase:
    """A meaning that can be put into words.

    Attributes:
        kind: How it picks out its thing.
        what: What the thing is like.
        key: What things of that kind are ordered by, beginning with the most extreme.
        rank: Place in that order, from 1.
        relation: How the thing lies to the anchor.
        anchor: What the anchor is like, of which there is one.
    """

    kind: Kind
    what: Description
    key: Key | None = None
    rank: int = 1
    relation: Relation | None = None
    anchor: Description | None = None

    def text(self) -> str:
        """Words of ``WORDS``."""
        noun = self.what.words()
        if self.anchor is not None:
            return f"the {noun} {self.relation} the {self.anchor.words()}"
        if self.key is None:
            return f"the {noun}"
        if self.kind == "comparative":
            return f"the {OF_TWO[self.key]} of the two {self.what.words(plural=True)}"
        if self.key in SIDES:
            if self.rank == 1:
                return f"the {self.key}-most {noun}"
            return f"the {RANKS[self.rank]} {noun} from the {self.key}"
        return f"the {'' if self.rank == 1 else RANKS[self.rank] + ' '}{self.key} {noun}"


def readings(things: Sequence[Thing]) -> list[Reading]:
    """All ways to look at a scene in which an expression must mean the same."""
    boxes = [thing.box for thing in things], [thing.full_box for thing in things]
    return [Reading(boxes=some, border=border) for some, border in product(boxes, BORDERS)]


def fitting(things: Sequence[Thing], what: Description, reading: Reading) -> list[int]:
    """Indices of the things that a description fits."""
    return [
        i
        for i, thing in enumerate(things)
        if what.color in (None, thing.color)
        and what.shape in (None, thing.shape)
        and what.pattern in (None, thing.pattern)
        and what.size in (None, SIZES[reading.side(i) >= reading.border])
    ]


def resolve(things: Sequence[Thing], phrase: Phrase, reading: Reading) -> int | None:
    """The thing that is meant in one reading; None where there is none, or none by a margin."""
    found = fitting(things, phrase.what, reading)
    if phrase.anchor is not None:
        anchors = fitting(things, phrase.anchor, reading)
        if len(anchors) != 1 or phrase.relation is None:
            return None
        return _related(
            phrase.relation, anchors[0], [i for i in found if i not in anchors], reading
        )
    if phrase.key is None:
        return found[0] if len(found) == 1 else None
    fewest = 2 if phrase.kind != "ordinal" else max(3, phrase.rank)
    if len(found) < fewest or (phrase.kind == "comparative" and len(found) != 2):
        return None
    return _ranked(found, phrase.rank, _PLACES[phrase.key], reading, by=phrase.key)


def _ranked(
    found: Sequence[int],
    rank: int,
    place: Callable[[Reading, int], float],
    reading: Reading,
    *,
    by: str,
) -> int | None:
    """The thing at a rank, if it is apart from those before and behind it."""
    ordered = sorted((place(reading, i), i) for i in found)
    for (first, i), (second, j) in pairwise(ordered[max(0, rank - 2) : rank + 1]):
        if by in SIDES:
            is_apart = second - first >= PLACE_MARGIN
        else:
            sides = sorted((reading.side(i), reading.side(j)))
            is_apart = sides[1] >= SIZE_MARGIN * sides[0]
        if not is_apart:
            return None
    return ordered[rank - 1][1]


_PLACES: dict[Key, Callable[[Reading, int], float]] = {
    "left": lambda reading, i: reading.center(i)[0],
    "right": lambda reading, i: -reading.center(i)[0],
    "top": lambda reading, i: reading.center(i)[1],
    "bottom": lambda reading, i: -reading.center(i)[1],
    "largest": lambda reading, i: -reading.side(i),
    "smallest": lambda reading, i: reading.side(i),
}


_SIDE_OF: dict[Relation, Key] = {
    "left of": "left",
    "right of": "right",
    "above": "top",
    "below": "bottom",
}


def _related(relation: Relation, anchor: int, found: Sequence[int], reading: Reading) -> int | None:
    """The only thing on a side of the anchor, or the one nearest to it."""
    if relation == "nearest to":
        x, y = reading.center(anchor)
        away = sorted(
            ((cx - x) * (cx - x) + (cy - y) * (cy - y), i)
            for i, (cx, cy) in ((i, reading.center(i)) for i in found)
        )
        if len(away) < 2 or away[1][0] < SIZE_MARGIN * SIZE_MARGIN * away[0][0]:
            return None
        return away[0][1]
    gaps = [(ahead(relation, anchor, i, reading), i) for i in found]
    beyond = [i for gap, i in gaps if gap > PLACE_MARGIN]
    close = [i for gap, i in gaps if abs(gap) <= PLACE_MARGIN]
    return beyond[0] if len(beyond) == 1 and not close else None


def ahead(relation: Relation, anchor: int, index: int, reading: Reading) -> float:
    """How far a thing is on a side of the anchor, pixels between centers; negative: not there."""
    place = _PLACES[_SIDE_OF[relation]]
    return place(reading, anchor) - place(reading, index)


def sample_expressions(
    rng: np.random.Generator, things: Sequence[Thing], count: int
) -> tuple[Expression, ...]:
    """Draw up to ``count`` expressions with different texts.

    Args:
        rng: Source of randomness; advanced by an amount that depends on ``count`` alone.
        things: Of the scene, at least one.
        count: How many to look for.
    """
    ways = readings(things)
    kinds = list(_SHARES)
    limits = np.cumsum(list(_SHARES.values()))
    found: dict[str, Expression] = {}
    for kind_draw, *choices in rng.random((count * _DRAWS_PER_EXPRESSION, 7)).tolist():
        kind = kinds[min(int(np.searchsorted(limits, kind_draw, "right")), len(kinds) - 1)]
        phrase = _draw_phrase(things, kind, choices)
        targets = {resolve(things, phrase, way) for way in ways}
        target = targets.pop()
        if targets or target is None:
            continue
        named = {i for way in ways for i in fitting(things, phrase.what, way)}
        if phrase.anchor is not None:
            named |= {i for way in ways for i in fitting(things, phrase.anchor, way)}
        text = phrase.text()
        found.setdefault(
            text, Expression(text=text, target=target, kind=kind, mentioned=tuple(sorted(named)))
        )
        if len(found) == count:
            break
    return tuple(found.values())


def _draw_phrase(things: Sequence[Thing], kind: Kind, choices: Sequence[float]) -> Phrase:
    """A phrase of words that fit something in the scene; it may pick out nothing."""
    what = _describe(things[int(choices[0] * len(things))], pick(_USES, choices[1]))
    if kind == "attribute":
        return Phrase(kind=kind, what=what)
    if kind == "relation":
        anchor = _describe(things[int(choices[2] * len(things))], pick(_USES, choices[3]))
        return Phrase(kind=kind, what=what, relation=pick(RELATIONS, choices[4]), anchor=anchor)
    key = pick(KEYS, choices[4])
    # No one says "the fourth smallest".
    ranks = tuple(RANKS) if key in SIDES else (2,)
    return Phrase(
        kind=kind, what=what, key=key, rank=pick(ranks, choices[5]) if kind == "ordinal" else 1
    )


def _describe(thing: Thing, use: _Use) -> Description:
    pattern = thing.pattern if use[1] and thing.pattern != "plain" else None
    x1, y1, x2, y2 = thing.full_box
    return Description(
        size=SIZES[max(x2 - x1, y2 - y1) >= BORDERS[1]] if use[0] else None,
        pattern=pattern,
        color=thing.color if use[2] else None,
        shape=thing.shape if use[3] else None,
    )


def pick(names: Sequence[_Named], choice: float) -> _Named:
    """One of several, by a number of [0, 1)."""
    return names[int(choice * len(names))]
