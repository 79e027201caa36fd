"""Drawing RefShapes-2 scenes with numpy: a floor up to a horizon, shadows, shaded things."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gap_export.evaluation.refshapes.objects import COLOR_VALUES
from gap_export.evaluation.refshapes.render import COLOR_JITTER, INSIDE, coverage, draw_ground
from gap_export.evaluation.refshapes2.things import Layout, Thing

_Image = NDArray[np.float32]
_SHADOW = 0.55
_DARK = 0.45
_RIM = 0.6


def render(rng: np.random.Generator, layout: Layout) -> NDArray[np.uint8]:
    """Paint a scene from the farthest thing to the nearest.

    Args:
        rng: Source of randomness for ground, light and color jitter; advanced.
        layout: What is where.

    Returns:
        uint8 [height, width, 3], RGB.
    """
    image = draw_ground(rng, layout.width, layout.height)
    _draw_floor(rng, image, layout.horizon)
    # One light for all things of a scene.
    light = rng.uniform(-0.25, 0.25, 2).astype(np.float32)
    jitter = rng.standard_normal((len(layout.things), 3), dtype=np.float32) * COLOR_JITTER
    for thing, shift in zip(reversed(layout.things), jitter, strict=True):
        x1, _, x2, bottom = thing.full_box
        if not thing.hangs:
            flat = max(3, (x2 - x1) // 6)
            shadow = coverage(INSIDE["circle"], x2 - x1, flat)
            black = np.zeros((flat, x2 - x1, 3), np.float32)
            _paste(image, black, shadow * _SHADOW, (x1, bottom - flat // 2))
        _paste(image, _surface(thing, shift, light), thing.mask, thing.full_box[:2])
    return np.clip(image, 0, 255).astype(np.uint8)


def _draw_floor(rng: np.random.Generator, image: _Image, horizon: int) -> None:
    """Tint the floor, shade it towards the horizon, and lay boards that seem to narrow there."""
    floor = image[horizon:]
    rows = np.arange(len(floor), dtype=np.float32)[:, None]
    columns = np.arange(image.shape[1], dtype=np.float32)[None, :]
    depth = (rows + 1) / len(floor)
    floor += rng.uniform(-25, 25, 3).astype(np.float32)
    floor += (depth * np.float32(rng.uniform(-30, 30)))[..., None]
    # Boards meet in the vanishing point, at which the depth is 0.
    middle = np.float32(image.shape[1] * rng.uniform(0.3, 0.7))
    board = (columns - middle) / depth // np.float32(rng.uniform(24, 70))
    floor += ((board % 2 - 0.5) * np.float32(rng.uniform(0, 22)))[..., None]


def _surface(thing: Thing, shift: NDArray[np.float32], light: NDArray[np.float32]) -> _Image:
    """Colors of a thing's full box, float32 [height, width, 3]: a gradient, and its pattern."""
    x1, y1, x2, y2 = thing.full_box
    width, height = x2 - x1, y2 - y1
    x = np.arange(width, dtype=np.float32)[None, :]
    y = np.arange(height, dtype=np.float32)[:, None]
    bright = 1 + light[0] * (2 * x / width - 1) + light[1] * (2 * y / height - 1)
    period = max(6, min(width, height) // 5)
    if thing.pattern == "striped":
        bright = np.where((x + y) % period < period / 2, bright * np.float32(_DARK), bright)
    elif thing.pattern == "dotted":
        across, down = x % period - period / 2, y % period - period / 2
        bright = np.where(
            across * across + down * down < period * period / 9, bright * np.float32(_DARK), bright
        )
    # Things of one color must be told apart where one is before the other.
    bright = np.where(_is_rim(thing.mask), bright * np.float32(_RIM), bright)
    color = np.asarray(COLOR_VALUES[thing.color], np.float32) + shift
    surface: _Image = (bright[..., None] * color).astype(np.float32)
    return surface


def _is_rim(mask: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Pixels next to one that a thing does not cover, bool as the mask."""
    covered = np.pad(mask >= 0.5, 1)
    around = covered[:-2, 1:-1] & covered[2:, 1:-1] & covered[1:-1, :-2] & covered[1:-1, 2:]
    is_rim: NDArray[np.bool_] = ~around
    return is_rim


def _paste(
    image: _Image, surface: _Image, alpha: NDArray[np.float32], corner: tuple[int, int]
) -> None:
    """Lay a surface over the image with its top-left corner at (x, y); what is outside is cut."""
    x, y = corner
    height, width = alpha.shape
    x1, y1 = max(x, 0), max(y, 0)
    x2, y2 = min(x + width, image.shape[1]), min(y + height, image.shape[0])
    if x1 < x2 and y1 < y2:
        own = slice(y1 - y, y2 - y), slice(x1 - x, x2 - x)
        region = image[y1:y2, x1:x2]
        region += alpha[own][..., None] * (surface[own] - region)
