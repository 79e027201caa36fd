"""Whether a frame shows what another one showed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

CELLS = 32


def summarize(image: Image.Image) -> NDArray[np.uint8]:
    """Means of an image's cells.

    Args:
        image: RGB.

    Returns:
        uint8 [32, 32, 3]: the mean color of each of 32 x 32 cells.
    """
    return np.asarray(image.resize((CELLS, CELLS), Image.Resampling.BOX, reducing_gap=None))


def sameness(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """How alike two frames of one size are, in [0, 1].

    One less the largest difference between the means of a cell, over 32 x 32 cells and three
    colors, as a share of 255. The largest and not the mean: a small thing that moves changes few
    cells. Means and not pixels: the noise of a sensor is gone in them.

    Args:
        one: uint8 [32, 32, 3], from :func:`summarize`.
        other: Likewise.
    """
    return 1.0 - float(np.abs(one.astype(np.int16) - other).max()) / 255.0
