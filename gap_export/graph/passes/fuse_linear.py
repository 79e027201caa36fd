"""Makes a linear layer on a matrix one Gemm that reads its weight as the checkpoint stores it."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from gap_export.graph.passes.matching import like
from gap_export.graph.passes.pattern_pass import PatternPass

# Gemm takes its bias from 11 on as an option.
_MIN_OPSET = 11


class FuseLinear(PatternPass):
    """Rewrites ``MatMul(x, Transpose(weight))`` to ``Gemm(x, weight, transB=1)``.

    A checkpoint holds weights [out, in], torch writes a bias-free linear layer as a product with
    the transposed weight, and ONNX Runtime then keeps a transposed copy of each in memory.
    Does not handle: an ``x`` that is not known to be a matrix, products of stacked matrices,
    weights that are computed, and a Transpose inside a subgraph. With a bias torch writes a Gemm by
    itself.
    """

    def apply(self, model: ir.Model) -> bool:
        """Rewrite; True if there was such a layer."""
        return model.opset_imports.get("", 0) >= _MIN_OPSET and super().apply(model)

    def pattern(self, op: Any, x: Any, weight: Any) -> Any:
        """The product of x [rows, in] and weight [out, in]."""
        return op.MatMul(x, op.Transpose(weight, _outputs=["turned"]))

    def replace(self, last: ir.Node, **values: Any) -> ir.Node | None:
        """A Gemm, where both are matrices and the weight is one."""
        x, weight = values["x"], values["weight"]
        perm = values["turned"].producer().attributes.get_ints("perm", [1, 0])
        ranks = [None if value.shape is None else value.shape.rank() for value in (x, weight)]
        # Without perm all axes are reversed: of two the same.
        if ranks != [2, 2] or list(perm) != [1, 0] or not weight.is_initializer():
            return None
        made = [like(last.outputs[0])]
        return ir.node("Gemm", [x, weight], {"transB": 1}, outputs=made, name=last.name)
