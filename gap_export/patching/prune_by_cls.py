"""``cls``: tokens most like the picture as a whole."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from gap_export.patching.find_cls import ClsDrop
from gap_export.patching.prune_by_score import PruneByScore
from gap_export.patching.prune_features import Steps

# A zero vector is like nothing: its cosine is 0, not NaN.
_SMALLEST_NORM = 1e-8


class PruneByCls(PruneByScore):
    """Cosine of CLS and each patch where CLS is dropped, which is the select layer, in float32."""

    name: ClassVar[str] = "PruneByCls"

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
