"""RefShapes objects and where they stand: attributes, boxes and the three kinds of layout.

Everything here is plain data in pixels of a 96x96 image whose origin is the top-left corner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

IMAGE_SIZE = 96
PATCH_SIZE = 8
GRID_SIZE = IMAGE_SIZE // PATCH_SIZE

COLOR_VALUES: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 230),
    "yellow": (235, 215, 50),
    "purple": (160, 50, 190),
    "cyan": (50, 210, 220),
    "white": (240, 240, 240),
    "orange": (245, 140, 30),
}
COLORS: tuple[str, ...] = tuple(COLOR_VALUES)
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "diamond")
SIZES: tuple[str, ...] = ("small", "big")
EXTENTS: dict[str, tuple[int, int]] = {"small": (20, 28), "big": (36, 48)}
"""Inclusive range of an object's side in pixels, by its size word."""

SMALL_PROBABILITY = 0.38
MIN_GAP = 1
_TRIES_PER_OBJECT = 24
_HALF = IMAGE_SIZE // 2

LAYOUTS: tuple[str, ...] = ("scattered", "crowded", "mosaic", "sparse")
LAYOUT_PROBABILITIES: dict[str, tuple[float, ...]] = {
    # Mosaics are an augmentation of the training data and no part of the question.
    "train": (0.50, 0.20, 0.18, 0.12),
    "heldout": (0.60, 0.25, 0.0, 0.15),
}
"""By split, in the order of `LAYOUTS`."""

# A slot is the square an object may be put in: (x, y, width, height, size word).
_Slot = tuple[int, int, int, int, str]


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        shape: One of `SHAPES`.
        color: One of `COLORS`.
        size: "small" or "big", decided by `extent` alone.
        extent: Side of the bounding square, pixels.
        x: Left edge, pixels.
        y: Top edge, pixels.
    """

    shape: str
    color: str
    size: Literal["small", "big"]
    extent: int
    x: int
    y: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """Bounding box (x1, y1, x2, y2) in pixels, x2 and y2 exclusive."""
        return self.x, self.y, self.x + self.extent, self.y + self.extent

    @property
    def center(self) -> tuple[float, float]:
        """Center (x, y) of the box in pixels."""
        return self.x + self.extent / 2, self.y + self.extent / 2


def sample_objects(rng: np.random.Generator, split: str) -> tuple[SceneObject, ...]:
    """Draw the objects of one scene: a layout, then attributes from small pools.

    Small pools repeat colors and shapes, so that an expression has something to tell apart.

    Args:
        rng: Source of randomness; advanced.
        split: Key of `LAYOUT_PROBABILITIES`.

    Returns:
        One or more objects that keep at least `MIN_GAP` pixels between their boxes.
    """
    layout = LAYOUTS[int(rng.choice(len(LAYOUTS), p=LAYOUT_PROBABILITIES[split]))]
    if layout == "crowded":
        squares = _crowded_squares(rng)
    elif layout == "mosaic":
        objects = _with_attributes(rng, _mosaic_squares(rng))
        # A share of the shapes, drawn for each scene, become squares, which leave no gaps.
        share = rng.uniform(0.4, 1.0)
        are_squares = (rng.random(len(objects)) < share).tolist()
        return tuple(
            replace(item, shape="square") if is_square else item
            for item, is_square in zip(objects, are_squares, strict=True)
        )
    else:
        low, high = (2, 5) if layout == "scattered" else (1, 2)
        squares = _scattered_squares(rng, int(rng.integers(low, high + 1)))
    return _with_attributes(rng, squares)


def _with_attributes(
    rng: np.random.Generator, squares: list[tuple[int, int, int, str]]
) -> tuple[SceneObject, ...]:
    """Give every square a color and a shape from the scene's pools."""
    count = len(squares)
    num_colors = int(np.clip(count - 1 + rng.integers(0, 2), 2, 5))
    num_shapes = int(np.clip(count - 2 + rng.integers(0, 2), 2, 4))
    color_pool = rng.permutation(len(COLORS))[:num_colors]
    shape_pool = rng.permutation(len(SHAPES))[:num_shapes]
    colors = color_pool[rng.integers(0, num_colors, count)]
    shapes = shape_pool[rng.integers(0, num_shapes, count)]
    return tuple(
        SceneObject(
            shape=SHAPES[shapes[i]],
            color=COLORS[colors[i]],
            size="small" if size == "small" else "big",
            extent=extent,
            x=x,
            y=y,
        )
        for i, (x, y, extent, size) in enumerate(squares)
    )


def _scattered_squares(rng: np.random.Generator, count: int) -> list[tuple[int, int, int, str]]:
    """Place up to `count` squares by rejection; one that finds no room is left out."""
    draws = rng.random((count, _TRIES_PER_OBJECT, 3)).tolist()
    squares: list[tuple[int, int, int, str]] = []
    for is_small, tries in zip(rng.random(count) < SMALL_PROBABILITY, draws, strict=True):
        size = "small" if is_small else "big"
        for extent_draw, x_draw, y_draw in tries:
            low, high = EXTENTS[size]
            extent = low + int(extent_draw * (high - low + 1))
            x = int(x_draw * (IMAGE_SIZE - extent + 1))
            y = int(y_draw * (IMAGE_SIZE - extent + 1))
            # The gap to another square is along the axis on which they are further apart.
            gaps = (
                max(left - x - extent, x - left - side, top - y - extent, y - top - side)
                for left, top, side, _ in squares
            )
            if all(gap >= MIN_GAP for gap in gaps):
                squares.append((x, y, extent, size))
                break
    return squares


def _crowded_squares(rng: np.random.Generator) -> list[tuple[int, int, int, str]]:
    """Fill most cells of a grid, each square jittered inside its cell.

    A model that has met images with hardly any background copes better when a pruner keeps
    nothing but object patches; these layouts are part of the data for that reason, in training
    and in the held-out set alike. Mosaics, which have none at all, are for training alone.
    """
    slots = _grid_slots(rng) if rng.random() < 0.4 else _quadrant_slots(rng)
    squares: list[tuple[int, int, int, str]] = []
    for (left, top, width, height, size), draw in zip(
        slots, rng.random((len(slots), 3)).tolist(), strict=True
    ):
        room = min(width, height) - MIN_GAP
        low, high = EXTENTS[size]
        # The upper part of the range only: crowded means that little background is left.
        low = max(low, min(high, room) - 5)
        extent = low + int(draw[0] * (min(high, room) - low + 1))
        x = left + int(draw[1] * (width - MIN_GAP - extent + 1))
        y = top + int(draw[2] * (height - MIN_GAP - extent + 1))
        squares.append((x, y, extent, size))
    return squares


def _mosaic_squares(rng: np.random.Generator) -> list[tuple[int, int, int, str]]:
    """Fill every quadrant to its edges: one big square, or four small ones.

    Such an image has next to no background. Where every training image has some, a decoder
    learns to park attention on it, and fails when a pruner keeps nothing but objects.
    """
    squares: list[tuple[int, int, int, str]] = []
    for quadrant, is_divided in enumerate((rng.random(4) < 0.3).tolist()):
        left, top = quadrant % 2 * _HALF, quadrant // 2 * _HALF
        cells, size = (2, "small") if is_divided else (1, "big")
        cell = _HALF // cells
        squares += [
            (left + column * cell, top + row * cell, cell - MIN_GAP, size)
            for row in range(cells)
            for column in range(cells)
        ]
    return squares


def _grid_slots(rng: np.random.Generator) -> list[_Slot]:
    """Cells of a 2x3, 3x2 or 3x3 grid of small objects, one or two of them left empty."""
    rows, columns = ((2, 3), (3, 2), (3, 3))[int(rng.integers(0, 3))]
    width, height = IMAGE_SIZE // columns, IMAGE_SIZE // rows
    order = rng.permutation(rows * columns)[: rows * columns - int(rng.integers(0, 3))]
    return [
        (int(cell) % columns * width, int(cell) // columns * height, width, height, "small")
        for cell in order
    ]


def _quadrant_slots(rng: np.random.Generator) -> list[_Slot]:
    """Quadrants that hold one big object, up to four small ones, one small one, or nothing."""
    slots: list[_Slot] = []
    for quadrant, content in enumerate(rng.random(4).tolist()):
        left, top = quadrant % 2 * _HALF, quadrant // 2 * _HALF
        if content < 0.65 or (quadrant == 3 and not slots):
            slots.append((left, top, _HALF, _HALF, "big"))
        elif content < 0.80:
            quarter = _HALF // 2
            slots += [
                (left + column * quarter, top + row * quarter, quarter, quarter, "small")
                for row in range(2)
                for column in range(2)
            ]
        elif content < 0.92:
            slots.append((left, top, _HALF, _HALF, "small"))
    return slots
