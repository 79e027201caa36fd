"""What both sides of a check are asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gap_export.runtime.images.geometry import Box


@dataclass(frozen=True, kw_only=True)
class Question:
    """An image and what to look for in it.

    Attributes:
        image: A file, or uint8 [H, W, 3].
        expression: What to look for.
        box: Where it is, (x1, y1, x2, y2) in pixels of the image; None where that is not known.
    """

    image: Path | NDArray[np.uint8]
    expression: str
    box: Box | None = None
