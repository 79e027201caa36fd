"""What passes have in common that rank the tokens of each picture."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import onnx_ir as ir

from gap_export.patching.find_cls import ClsDrop, find_cls_drop
from gap_export.patching.prune_features import PruneFeatures, Steps


class PruneByScore(PruneFeatures):
    """Keeps the best of each picture, in raster order; of equals the lower index.

    Tokens are ranked by pairwise comparison, so that no runtime's TopK decides between equals.

    Args:
        num_kept_tokens: K.
        num_visual_tokens: N.
    """

    def __init__(self, *, num_kept_tokens: int, num_visual_tokens: int) -> None:
        super().__init__(num_visual_tokens=num_visual_tokens)
        self._num_kept = num_kept_tokens

    @abstractmethod
    def _score(self, model: ir.Model, drop: ClsDrop, steps: Steps) -> ir.Value:
        """Float32 [I, N, 1], higher is better."""

    @property
    def _num_kept_tokens(self) -> int:
        return self._num_kept

    def _choose(self, model: ir.Model, features: ir.Value, steps: Steps) -> ir.Value:
        scores = self._score(model, find_cls_drop(features), steps)
        # [I, N, 1] against [I, 1, N].
        others = steps("Transpose", scores, perm=[0, 2, 1])
        index = np.arange(self._num_visual_tokens, dtype=np.int64)
        lower = steps("Less", index[None, None, :], index[None, :, None])
        ties = steps("And", steps("Equal", others, scores), lower)
        beaten = steps("Or", steps("Greater", others, scores), ties)
        counts = steps("Cast", beaten, to=ir.DataType.INT64)
        rank = steps("ReduceSum", counts, [2], keepdims=0)
        best = _smallest(rank, self._num_kept, steps).outputs[1]
        return _smallest(best, self._num_kept, steps).outputs[0]

    def _gather(self, features: ir.Value, keep: ir.Value, steps: Steps) -> ir.Value:
        return steps("GatherND", features, steps("Unsqueeze", keep, [2]), batch_dims=1)


def _smallest(values: ir.Value, count: int, steps: Steps) -> ir.Node:
    """TopK's node: values, then indices, ascending."""
    found = steps("TopK", values, [count], axis=1, largest=0, sorted=1, num_outputs=2)
    node = found.producer()
    assert node is not None
    return node
