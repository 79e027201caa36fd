"""``spatial``: an even lattice over the picture."""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gap_export.manifest import GridSpec, Order
from gap_export.pruning.pruner import FixedPruner


class SpatialPruner(FixedPruner):
    """Exactly K places: r rows, K spread evenly over them, columns evenly within a row.

    r is sqrt(K * rows / cols), rounded half up and kept to what K needs and the grid has. Row u of
    r lies at the middle of the u-th of r equal bands of the grid, columns likewise.
    """

    summary: ClassVar[str] = "an even lattice, the same for every picture"
    orders: ClassVar[tuple[Order, ...]] = ("raster",)

    def places(
        self, grid: GridSpec, *, num_kept_tokens: int, seed: int | None
    ) -> NDArray[np.int64]:
        """int64 [K], ascending."""
        del seed
        wanted = math.floor(math.sqrt(num_kept_tokens * grid.rows / grid.cols) + 0.5)
        fewest = -(-num_kept_tokens // grid.cols)
        num_rows = min(max(wanted, fewest), grid.rows, num_kept_tokens)
        places: list[int] = []
        for band in range(num_rows):
            row = _middle(band, num_rows, grid.rows)
            start, end = (n * num_kept_tokens // num_rows for n in (band, band + 1))
            count = end - start
            places += [row * grid.cols + _middle(n, count, grid.cols) for n in range(count)]
        return np.array(places, dtype=np.int64)


def _middle(band: int, num_bands: int, length: int) -> int:
    """Cell at the middle of one of ``num_bands`` equal bands of ``length`` cells."""
    return (2 * band + 1) * length // (2 * num_bands)
