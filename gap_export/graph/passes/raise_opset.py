"""Declares a newer opset, where that changes nothing but the number."""

from __future__ import annotations

import onnx_ir as ir

from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.matching import all_nodes, graphs_of

_FROM, _TO = 20, 24
# Operators whose newer versions up to 24 only take more types, or have more attributes with a
# default that means what the old version did.
UNCHANGED_OPERATORS = frozenset(
    """
    Abs Add And ArgMax Cast Clip Concat Constant Conv Cos CumSum DequantizeLinear Div Equal Erf
    Expand Gather GatherElements Gelu Gemm Greater GreaterOrEqual LayerNormalization Less
    LessOrEqual Log MatMul Max Min Mod Mul Neg Not Or Pad Pow Range Reciprocal ReduceMax ReduceMean
    ReduceMin ReduceSum Reshape Scan Shape Sigmoid Sin Slice Softmax Split Sqrt Squeeze Sub Tanh
    TopK Transpose Unsqueeze Where
    """.split()
)


class RaiseOpset(GraphPass):
    """Sets the opset of the standard operators to 24, in the graph and in its functions.

    Does not handle: opsets before 20, and operators whose meaning it was not checked for.
    """

    def apply(self, model: ir.Model) -> bool:
        """Raise; False if it is 24 already.

        Raises:
            PassError: the opset is too old or newer, or an operator is not known to stay the same.
        """
        opset = model.opset_imports.get("")
        if opset == _TO:
            return False
        if opset is None or not _FROM <= opset <= _TO:
            raise PassError("cannot raise this opset", seen=opset, allowed=f"{_FROM} to {_TO}")
        for node in all_nodes(model):
            if node.domain == "" and node.op_type not in UNCHANGED_OPERATORS:
                raise PassError(
                    f"an operator is not known to mean the same in opset {_TO}",
                    seen=f"{node.op_type}, node {node.name}",
                    allowed=", ".join(sorted(UNCHANGED_OPERATORS)),
                )
        for graph in graphs_of(model):
            graph.opset_imports[""] = _TO
        return True
