"""``fastervlm``: tokens that CLS attends to (FasterVLM, arXiv 2412.01818)."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from gap_export.patching.find_cls import ClsDrop, find_cls_attention
from gap_export.patching.prune_by_score import PruneByScore
from gap_export.patching.prune_features import Steps

_TO_THE_END = (1 << 63) - 1


class PruneByAttention(PruneByScore):
    """Attention of CLS to each patch in the layer that gave the features, summed over heads.

    Does not handle attention that is one operator, which gives no weights.
    """

    name: ClassVar[str] = "PruneByAttention"

    def _score(self, model: ir.Model, drop: ClsDrop, steps: Steps) -> ir.Value:
        weights = find_cls_attention(model, drop, num_visual_tokens=self._num_visual_tokens)
        of_cls = steps("Slice", weights, [0, 1], [1, _TO_THE_END], [-2, -1])
        images = steps("Slice", steps("Shape", drop.patches), [0], [1], [0])
        # Some graphs have pictures and heads on one axis.
        shape = steps("Concat", images, [-1, self._num_visual_tokens], axis=0)
        by_head = steps("Reshape", steps("Cast", of_cls, to=ir.DataType.FLOAT), shape)
        return steps("Unsqueeze", steps("ReduceSum", by_head, [1], keepdims=0), [2])
