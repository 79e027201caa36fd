"""``spatial``: an even lattice over the image."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gap_export.pruning.pruner import FixedPruner
from gap_export.spec.manifest import GridSpec, Order
from gap_export.spec.places import lattice_places


class SpatialPruner(FixedPruner):
    """Exactly K places on a lattice; see :func:`gap_export.spec.places.lattice_places`."""

    summary: ClassVar[str] = "an even lattice, the same for every image"
    orders: ClassVar[tuple[Order, ...]] = ("raster",)

    def places(
        self, grid: GridSpec, *, num_kept_tokens: int, seed: int | None
    ) -> NDArray[np.int64]:
        """int64 [K], ascending."""
        del seed
        return lattice_places(grid, num_kept_tokens=num_kept_tokens)
