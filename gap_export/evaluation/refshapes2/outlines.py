"""Shapes of RefShapes-2: those of RefShapes, and thin and concave ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gap_export.evaluation.refshapes.objects import SHAPES as PLAIN_SHAPES
from gap_export.evaluation.refshapes.render import INSIDE, Inside, Plane


def _crescent(x: Plane, y: Plane) -> NDArray[np.bool_]:
    # Of the circle's width three quarters are left; they are stretched over the whole box.
    x = (x + 1) * 0.75 - 1
    return (x * x + y * y <= 1) & ((x - 0.55) * (x - 0.55) + y * y > 0.8)


def _arrow(x: Plane, y: Plane) -> NDArray[np.bool_]:
    shaft = (x <= 0.1) & (np.abs(y) <= 0.3)
    return shaft | ((x >= 0) & (np.abs(y) <= 1 - x))


def _cup(x: Plane, y: Plane) -> NDArray[np.bool_]:
    body = (np.abs(x + 0.3) <= 0.7 - 0.12 * (y + 1)) & (np.abs(y) <= 1)
    around = (x - 0.35) * (x - 0.35) / 0.4225 + (y + 0.1) * (y + 0.1) / 0.36
    return body | ((x > 0.2) & (around <= 1) & (around >= 0.35))


def _ring(x: Plane, y: Plane) -> NDArray[np.bool_]:
    radius = x * x + y * y
    return (radius <= 1) & (radius >= 0.36)


def _frame(x: Plane, y: Plane) -> NDArray[np.bool_]:
    return np.maximum(np.abs(x), np.abs(y)) >= 0.7


OUTLINES: dict[str, Inside] = {
    **INSIDE,
    "crescent": _crescent,
    "arrow": _arrow,
    "cup": _cup,
    "ring": _ring,
    "frame": _frame,
    "rod": lambda x, y: (np.abs(x) <= 1) & (np.abs(y) <= 1),
}
SHAPES: tuple[str, ...] = tuple(OUTLINES)
FIXED = frozenset({"circle", "square"})
"""Shapes that are called something else when they are stretched."""
SOLID = frozenset({*PLAIN_SHAPES, "cup", "arrow"}) - {"cross", "star"}
"""Shapes broad enough for a pattern to show on them."""
