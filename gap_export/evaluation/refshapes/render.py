"""Drawing RefShapes scenes with numpy alone: anti-aliased shapes on muted, textured grounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
from numpy.typing import NDArray

from gap_export.evaluation.refshapes.objects import (
    COLOR_VALUES,
    GRID_SIZE,
    IMAGE_SIZE,
    PATCH_SIZE,
    SceneObject,
)

MIN_PATCH_PIXELS = 7.0
"""A patch belongs to an object that covers more than this many of its 64 pixels."""

COLOR_JITTER = 8.0
"""Standard deviation of an object's color around that of its name, in 8-bit steps."""

_SUPERSAMPLING = 4

Plane = NDArray[np.float64]
Inside = Callable[[Plane, Plane], NDArray[np.bool_]]
"""Which points (x, y) of the square [-1, 1] a shape covers; y points down."""


def render(
    rng: np.random.Generator, objects: Sequence[SceneObject]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw the objects and say which of them each patch belongs to.

    Args:
        rng: Source of randomness for the ground and the color jitter; advanced.
        objects: Objects with boxes inside the image that do not overlap.

    Returns:
        image: uint8 [96, 96, 3], RGB.
        object_map: int64 [12, 12], index of the object that covers most of the patch, or -1.
    """
    image = draw_ground(rng, IMAGE_SIZE, IMAGE_SIZE)
    object_map = np.full((GRID_SIZE, GRID_SIZE), -1, np.int64)
    most = np.full((GRID_SIZE, GRID_SIZE), MIN_PATCH_PIXELS, np.float32)
    jitter = rng.standard_normal((len(objects), 3), dtype=np.float32) * COLOR_JITTER
    for index, item in enumerate(objects):
        alpha = shape_mask(item.shape, item.extent)
        x1, y1, x2, y2 = item.box
        color = np.asarray(COLOR_VALUES[item.color], np.float32) + jitter[index]
        region = image[y1:y2, x1:x2]
        region += alpha[..., None] * (color - region)
        canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), np.float32)
        canvas[y1:y2, x1:x2] = alpha
        # Pixels in each patch, float32 [12, 12].
        covered = canvas.reshape(GRID_SIZE, PATCH_SIZE, GRID_SIZE, PATCH_SIZE).sum((1, 3))
        wins = covered > most
        object_map[wins] = index
        most[wins] = covered[wins]
    return np.clip(image, 0, 255).astype(np.uint8), object_map


@cache
def shape_mask(shape: str, extent: int) -> NDArray[np.float32]:
    """Coverage of a shape that touches all four sides of its square.

    Args:
        shape: One of `SHAPES`.
        extent: Side in pixels.

    Returns:
        float32 [extent, extent] in [0, 1]; shared and read-only.
    """
    return coverage(INSIDE[shape], extent, extent)


def coverage(inside: Inside, width: int, height: int) -> NDArray[np.float32]:
    """How much of each pixel a shape covers that is stretched over a box.

    Returns:
        float32 [height, width] in [0, 1], read-only.
    """
    samples = width * _SUPERSAMPLING, height * _SUPERSAMPLING
    x, y = np.meshgrid(*((np.arange(n) + 0.5) / n * 2 - 1 for n in samples))
    blocks = inside(x, y).reshape(height, _SUPERSAMPLING, width, _SUPERSAMPLING)
    mask: NDArray[np.float32] = blocks.mean((1, 3)).astype(np.float32)
    mask.setflags(write=False)
    return mask


def _star(x: Plane, y: Plane) -> NDArray[np.bool_]:
    """Five-pointed star stretched to fill the square [-1, 1] (even-odd rule)."""
    corner = np.arange(10)
    radius = np.where(corner % 2 == 0, 1.0, 0.4)
    angle = -np.pi / 2 + corner * np.pi / 5
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], -1)
    low, high = points.min(0), points.max(0)
    points = (points - low) / (high - low) * 2 - 1
    inside = np.zeros(x.shape, bool)
    for (x1, y1), (x2, y2) in zip(points, np.roll(points, 1, 0), strict=True):
        if y1 == y2:
            continue
        crossed = ((y1 > y) != (y2 > y)) & (x < (x2 - x1) * (y - y1) / (y2 - y1) + x1)
        inside ^= crossed
    return inside


INSIDE: dict[str, Inside] = {
    "circle": lambda x, y: x * x + y * y <= 1,
    "square": lambda x, y: (np.abs(x) <= 1) & (np.abs(y) <= 1),
    "triangle": lambda x, y: np.abs(x) <= (y + 1) / 2,
    "star": _star,
    "cross": lambda x, y: (np.abs(x) <= 0.33) | (np.abs(y) <= 0.33),
    "diamond": lambda x, y: np.abs(x) + np.abs(y) <= 1,
}


def draw_ground(rng: np.random.Generator, width: int, height: int) -> NDArray[np.float32]:
    """A dim, nearly gray ground: block noise, pixel noise and one of four large textures.

    Args:
        rng: Source of randomness; advanced.
        width: Of the image, pixels; whole patches.
        height: As ``width``.

    Returns:
        float32 [height, width, 3], values roughly 0..150.
    """
    base = rng.uniform(25, 110) + rng.uniform(-18, 18, 3)
    grid = height // PATCH_SIZE, width // PATCH_SIZE
    blocks = rng.standard_normal(grid, dtype=np.float32) * rng.uniform(3, 11)
    luminance = np.repeat(np.repeat(blocks, PATCH_SIZE, 0), PATCH_SIZE, 1)
    luminance = luminance + _texture(rng, width, height)
    image = rng.standard_normal((height, width, 3), dtype=np.float32)
    image *= np.float32(rng.uniform(4, 11))
    image += luminance[..., None]
    image += base.astype(np.float32)
    return image


def _texture(rng: np.random.Generator, width: int, height: int) -> NDArray[np.float32]:
    """Gradient, stripes, checkers or nothing; float32 [height, width], gray levels around 0.

    Only additions and floor divisions, so that the bytes do not depend on a math library.
    """
    kind = int(rng.integers(0, 4))
    strength = np.float32(rng.uniform(5, 16))
    slope_x, slope_y = (int(v) for v in rng.integers(-3, 4, 2))
    period = int(rng.integers(10, 40))
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    ramp = slope_x * x + slope_y * y
    if kind == 0:
        return (ramp / (3.0 * max(width, height)) * 2 * strength).astype(np.float32)
    if kind == 1:
        return ((ramp // period % 2 - 0.5) * strength).astype(np.float32)
    if kind == 2:
        parity = (x // period + y // period) % 2
        return ((parity - 0.5) * strength).astype(np.float32)
    return np.zeros((height, width), np.float32)
