"""Things of a RefShapes-2 scene and where they stand: clutter in perspective, partly hidden.

Things are placed from the nearest to the farthest, each where enough of it can be seen past those
before it and inside the image. So what can be seen of a thing is known as soon as it is placed.
All lengths are in pixels; the origin is the image's top-left corner.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gap_export.evaluation.refshapes.objects import COLORS
from gap_export.evaluation.refshapes.render import coverage
from gap_export.evaluation.refshapes2.outlines import FIXED, OUTLINES, SHAPES, SOLID

Box = tuple[int, int, int, int]
Pattern = Literal["plain", "striped", "dotted"]

PATTERNS: tuple[Pattern, ...] = ("striped", "dotted")
CANVASES: tuple[tuple[int, int], ...] = (
    *((136, 272), (152, 240), (168, 216), (192, 192)),
    *((216, 168), (240, 152), (272, 136)),
)
"""Width and height of an image: whole patches, about the same area, 1:2 to 2:1."""
MIN_THINGS, MAX_THINGS = 10, 25
MIN_VISIBLE_SHARE = 0.5
MIN_VISIBLE_PIXELS = 48
BORDERS = (32, 40)
"""A thing below the first is small, one from the second on is big, one between may be either."""

_SIDES = ((30, 46), (58, 84))
_SCALES = (0.5, 1.15)
_STRETCHES = (0.85, 1.2)
_ROD_ASPECT = 6.0
_MIN_PATTERN_SIDE = 24
_TRIES = 14
_NUM_SHAPES, _NUM_COLORS = 5, 5
_COPY_PROBABILITY, _HANGING_PROBABILITY, _PATTERN_PROBABILITY = 0.3, 0.3, 0.4


@dataclass(frozen=True, kw_only=True)
class Thing:
    """One thing of a scene.

    Attributes:
        shape: One of ``SHAPES``.
        color: One of RefShapes' colors.
        pattern: ``plain``, or what is on it.
        depth: 0 at the horizon, 1 at the image's lower border and above; a nearer thing hides a
            farther one.
        hangs: It does not stand on the floor.
        flipped: It is drawn left side right.
        full_box: (x1, y1, x2, y2) of the whole thing, which may reach over the image's border.
        box: The same of what can be seen of it: what is not hidden and inside the image.
    """

    shape: str
    color: str
    pattern: Pattern
    depth: float
    hangs: bool
    flipped: bool
    full_box: Box
    box: Box

    @property
    def mask(self) -> NDArray[np.float32]:
        """How much of each pixel of the full box it covers, float32 [height, width]."""
        x1, y1, x2, y2 = self.full_box
        return _mask(self.shape, x2 - x1, y2 - y1, flipped=self.flipped)


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Where everything is.

    Attributes:
        width: Of the image.
        height: Of the image.
        horizon: Row at which the floor ends.
        things: From the nearest to the farthest.
        owners: int64 [height, width], index of the thing seen at a pixel, or -1.
    """

    width: int
    height: int
    horizon: int
    things: tuple[Thing, ...]
    owners: NDArray[np.int64]


@lru_cache(maxsize=1024)
def _mask(shape: str, width: int, height: int, *, flipped: bool) -> NDArray[np.float32]:
    mask = coverage(OUTLINES[shape], width, height)
    return mask[:, ::-1] if flipped else mask


@dataclass(frozen=True, kw_only=True)
class _Pools:
    """What the looks of a scene's things are drawn from: small, so that things look alike."""

    shapes: tuple[str, ...]
    colors: tuple[str, ...]
    pattern: Pattern


@dataclass(frozen=True, kw_only=True)
class _Look:
    """A thing that has no place yet; ``across`` and ``down`` are its width and height."""

    shape: str
    color: str
    pattern: Pattern
    hangs: bool
    flipped: bool
    across: int
    down: int


def sample_layout(rng: np.random.Generator) -> Layout | None:
    """Draw one scene; None where too few things found a place.

    Args:
        rng: Source of randomness; advanced.
    """
    width, height = CANVASES[int(rng.integers(len(CANVASES)))]
    horizon = int(height * rng.uniform(0.2, 0.45))
    wanted = int(rng.integers(MIN_THINGS, MAX_THINGS + 1))
    depths = sorted(rng.uniform(0.0, 1.1, wanted).tolist(), reverse=True)
    pools = _Pools(
        shapes=tuple(SHAPES[i] for i in rng.permutation(len(SHAPES))[:_NUM_SHAPES]),
        colors=tuple(COLORS[i] for i in rng.permutation(len(COLORS))[:_NUM_COLORS]),
        pattern=PATTERNS[int(rng.integers(len(PATTERNS)))],
    )
    owners = np.full((height, width), -1, np.int64)
    things: list[Thing] = []
    for depth in depths:
        look = _draw_look(rng, pools, things, depth)
        foot = horizon + depth * (height - horizon)
        middle = look.down / 2
        # Up to half of it may lie beyond the left or the right border.
        places = (
            (
                round(x_draw * width - look.across / 2),
                round(middle + y_draw * (foot - middle) if look.hangs else foot) - look.down,
            )
            for x_draw, y_draw in rng.random((_TRIES, 2)).tolist()
        )
        mask = _mask(look.shape, look.across, look.down, flipped=look.flipped)
        placed = _place(mask, places, owners)
        if placed is None:
            continue
        (x, y), seen = placed
        owners[seen] = len(things)
        rows, columns = np.nonzero(seen)
        left, top = int(columns.min()), int(rows.min())
        things.append(
            Thing(
                shape=look.shape,
                color=look.color,
                pattern=look.pattern,
                depth=depth,
                hangs=look.hangs,
                flipped=look.flipped,
                full_box=(x, y, x + look.across, y + look.down),
                box=(left, top, int(columns.max()) + 1, int(rows.max()) + 1),
            )
        )
    if len(things) < MIN_THINGS:
        return None
    return Layout(width=width, height=height, horizon=horizon, things=tuple(things), owners=owners)


def _draw_look(
    rng: np.random.Generator, pools: _Pools, things: Sequence[Thing], depth: float
) -> _Look:
    """Draw what a thing at a depth looks like; some are near-duplicates of one that is there."""
    if things and rng.random() < _COPY_PROBABILITY:
        like = things[int(rng.integers(len(things)))]
        shape, color = like.shape, like.color
    else:
        shape = pools.shapes[int(rng.integers(len(pools.shapes)))]
        color = pools.colors[int(rng.integers(len(pools.colors)))]
    across, down = _draw_size(rng, shape, depth)
    has_pattern = (
        rng.random() < _PATTERN_PROBABILITY
        and shape in SOLID
        and min(across, down) >= _MIN_PATTERN_SIDE
    )
    return _Look(
        shape=shape,
        color=color,
        pattern=pools.pattern if has_pattern else "plain",
        hangs=bool(rng.random() < _HANGING_PROBABILITY),
        flipped=bool(rng.random() < 0.5),
        across=across,
        down=down,
    )


def _draw_size(rng: np.random.Generator, shape: str, depth: float) -> tuple[int, int]:
    """Width and height of a thing as it looks at a depth."""
    near, far = _SCALES[1], _SCALES[0]
    low, high = _SIDES[int(rng.integers(len(_SIDES)))]
    side = rng.uniform(low, high) * (far + (near - far) * depth)
    stretch = rng.uniform(*_STRETCHES)
    stands = rng.random() < 0.5
    if shape == "rod":
        long, thin = round(side), max(4, round(side / _ROD_ASPECT))
        return (thin, long) if stands else (long, thin)
    if shape in FIXED:
        return round(side), round(side)
    return round(side * stretch), round(side)


def _place(
    mask: NDArray[np.float32], places: Iterable[tuple[int, int]], owners: NDArray[np.int64]
) -> tuple[tuple[int, int], NDArray[np.bool_]] | None:
    """The first place, a top-left corner, at which enough of a thing is seen, and its pixels."""
    height, width = owners.shape
    covers = mask >= 0.5
    enough = max(MIN_VISIBLE_PIXELS, MIN_VISIBLE_SHARE * covers.sum())
    for x, y in places:
        x1, y1 = max(x, 0), max(y, 0)
        x2, y2 = min(x + covers.shape[1], width), min(y + covers.shape[0], height)
        seen = np.zeros((height, width), bool)
        if x1 < x2 and y1 < y2:
            seen[y1:y2, x1:x2] = covers[y1 - y : y2 - y, x1 - x : x2 - x]
            seen &= owners < 0
        if seen.sum() >= enough:
            return (x, y), seen
    return None
