"""Passes that rank the tokens of each image: by CLS, and by what CLS attends to."""

from __future__ import annotations

from abc import abstractmethod

import numpy as np
import onnx_ir as ir

from gap_export.patching.find_cls import ClsDrop, find_cls_attention, find_cls_drop
from gap_export.patching.prune_features import PruneFeatures, Steps

_TO_THE_END = (1 << 63) - 1
# A zero vector is like nothing: its cosine is 0, not NaN.
_SMALLEST_NORM = 1e-8


class PruneByScore(PruneFeatures):
    """Keeps the best of each image, in raster order; of equals the lower index.

    Tokens are ranked by pairwise comparison, so that no runtime's TopK decides between equals.
    """

    @abstractmethod
    def _score(self, model: ir.Model, drop: ClsDrop, steps: Steps) -> ir.Value:
        """Float32 [I, N, 1], higher is better."""

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
        best = _smallest(rank, self._num_kept_tokens, steps).outputs[1]
        return _smallest(best, self._num_kept_tokens, steps).outputs[0]

    def _gather(self, features: ir.Value, keep: ir.Value, steps: Steps) -> ir.Value:
        return steps("GatherND", features, steps("Unsqueeze", keep, [2]), batch_dims=1)


def _smallest(values: ir.Value, count: int, steps: Steps) -> ir.Node:
    """TopK's node: values, then indices, ascending."""
    found = steps("TopK", values, [count], axis=1, largest=0, sorted=1, num_outputs=2)
    node = found.producer()
    assert node is not None
    return node


class PruneByCls(PruneByScore):
    """``cls``: cosine of CLS and each patch where CLS is dropped, in float32."""

    def _score(self, model: ir.Model, drop: ClsDrop, steps: Steps) -> ir.Value:
        del model
        cls = _unit(steps("Slice", drop.hidden, [0], [1], [1]), steps)
        patches = _unit(drop.patches, steps)
        return steps("MatMul", patches, steps("Transpose", cls, perm=[0, 2, 1]))


def _unit(vectors: ir.Value, steps: Steps) -> ir.Value:
    wide = steps("Cast", vectors, to=ir.DataType.FLOAT)
    squares = steps("ReduceSum", steps("Mul", wide, wide), [-1], keepdims=1)
    norm = steps("Max", steps("Sqrt", squares), np.array(_SMALLEST_NORM, dtype=np.float32))
    return steps("Div", wide, norm)


class PruneByAttention(PruneByScore):
    """``fastervlm``: attention of CLS to each patch in the layer that gave the features.

    It is summed over heads (FasterVLM, arXiv 2412.01818). Does not handle attention that is
    one operator, which gives no weights.
    """

    def _score(self, model: ir.Model, drop: ClsDrop, steps: Steps) -> ir.Value:
        weights = find_cls_attention(model, drop, num_visual_tokens=self._num_visual_tokens)
        of_cls = steps("Slice", weights, [0, 1], [1, _TO_THE_END], [-2, -1])
        images = steps("Slice", steps("Shape", drop.patches), [0], [1], [0])
        # Some graphs have images and heads on one axis.
        shape = steps("Concat", images, [-1, self._num_visual_tokens], axis=0)
        by_head = steps("Reshape", steps("Cast", of_cls, to=ir.DataType.FLOAT), shape)
        return steps("Unsqueeze", steps("ReduceSum", by_head, [1], keepdims=0), [2])
