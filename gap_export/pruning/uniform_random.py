"""``random``: tokens drawn uniformly, once, at export."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from gap_export.pruning.pruner import FixedPruner
from gap_export.spec.manifest import GridSpec
from gap_export.spec.places import drawn_places


class RandomPruner(FixedPruner):
    """K places without replacement, in the order drawn: a larger K only adds places.

    See :func:`gap_export.spec.places.drawn_places`.
    """

    summary: ClassVar[str] = "drawn once at export, from the seed"
    uses_seed: ClassVar[bool] = True

    def places(
        self, grid: GridSpec, *, num_kept_tokens: int, seed: int | None
    ) -> NDArray[np.int64]:
        """int64 [K], in the order drawn."""
        assert seed is not None
        return drawn_places(grid.num_visual_tokens, num_kept_tokens=num_kept_tokens, seed=seed)
