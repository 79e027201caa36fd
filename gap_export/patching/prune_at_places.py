"""``spatial`` and ``random``: the same places in every picture."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.patching.prune_features import PruneFeatures, Steps


class PruneAtPlaces(PruneFeatures):
    """Keeps the same places in every picture; they are a constant of the graph.

    Args:
        places: int64 [K] of 0..N-1, in the order they are fed.
        num_visual_tokens: N.
    """

    name: ClassVar[str] = "PruneAtPlaces"

    def __init__(self, places: NDArray[np.int64], *, num_visual_tokens: int) -> None:
        super().__init__(num_visual_tokens=num_visual_tokens)
        self._places = places

    @property
    def _num_kept_tokens(self) -> int:
        return len(self._places)

    def _choose(self, model: ir.Model, features: ir.Value, steps: Steps) -> ir.Value:
        del model
        rows = steps("Slice", steps("Shape", features), [0], [1], [0])
        shape = steps("Concat", rows, [self._num_kept_tokens], axis=0)
        return steps("Expand", self._places[None], shape)

    def _gather(self, features: ir.Value, keep: ir.Value, steps: Steps) -> ir.Value:
        del keep
        return steps("Gather", features, self._places, axis=1)
