"""``random``: tokens drawn uniformly, once, at export."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gap_export.manifest import GridSpec
from gap_export.pruning.pruner import FixedPruner


class RandomPruner(FixedPruner):
    """K places without replacement, in the order drawn.

    Each place gets a raw 64-bit number and the K smallest win. numpy keeps the raw stream of PCG64
    the same in all versions (NEP 19), which it does not promise for ``Generator.choice``; so a seed
    means the same places everywhere, and a larger K only adds places.
    """

    summary: ClassVar[str] = "drawn once at export, from the seed"
    uses_seed: ClassVar[bool] = True

    def places(
        self, grid: GridSpec, *, num_kept_tokens: int, seed: int | None
    ) -> NDArray[np.int64]:
        """int64 [K], in the order drawn."""
        assert seed is not None
        lots = np.random.PCG64(seed).random_raw(grid.num_visual_tokens)
        return np.argsort(lots, kind="stable")[:num_kept_tokens].astype(np.int64)
