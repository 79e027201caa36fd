"""Makes a linear layer on a matrix one Gemm that reads its weight as the checkpoint stores it."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from gap_export.graph.passes.graph_pass import GraphPass

_TRANSPOSED = [1, 0]
# Gemm takes its bias from 11 on as an option.
_MIN_OPSET = 11


class FuseLinear(GraphPass):
    """Rewrites ``MatMul(x, Transpose(weight))`` to ``Gemm(x, weight, transB=1)``.

    A checkpoint holds weights [out, in], torch writes a bias-free linear layer as a product with
    the transposed weight, and ONNX Runtime then keeps a transposed copy of each in memory.
    Does not handle: an ``x`` that is not known to be a matrix, products of stacked matrices,
    weights that are computed, and a Transpose inside a subgraph. Biases are torch's business: with
    one it writes a Gemm by itself.
    """

    name: ClassVar[str] = "FuseLinear"

    def apply(self, model: ir.Model) -> bool:
        """Rewrite; True if there was such a layer."""
        if model.opset_imports.get("", 0) < _MIN_OPSET:
            return False
        modified = False
        for node in list(model.graph):
            transpose = _transposed_weight(node)
            if transpose is None:
                continue
            _rewrite(model.graph, node, transpose)
            modified = True
        return modified


def _transposed_weight(node: ir.Node) -> ir.Node | None:
    """The Transpose behind the second factor of a linear layer; None where it is something else."""
    if node.op_type != "MatMul" or node.domain != "" or len(node.inputs) != 2:
        return None
    left, right = node.inputs
    if left is None or right is None or left.shape is None or left.shape.rank() != 2:
        return None
    transpose = right.producer()
    if transpose is None or transpose.op_type != "Transpose" or transpose.domain != "":
        return None
    weight = transpose.inputs[0]
    if weight is None or not weight.is_initializer() or weight.shape is None:
        return None
    perm = transpose.attributes.get("perm")
    # Without perm, all dimensions are reversed: for two the same.
    given = _TRANSPOSED if perm is None else list(perm.as_ints())
    return transpose if weight.shape.rank() == 2 and given == _TRANSPOSED else None


def _rewrite(graph: ir.Graph, matmul: ir.Node, transpose: ir.Node) -> None:
    old = matmul.outputs[0]
    new = ir.Value(name=old.name, type=old.type, shape=old.shape)
    gemm = ir.Node(
        "",
        "Gemm",
        [matmul.inputs[0], transpose.inputs[0]],
        [ir.AttrInt64("transB", 1)],
        outputs=[new],
        name=matmul.name,
    )
    gemm.metadata_props.update(matmul.metadata_props)
    graph.insert_before(matmul, gemm)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(matmul, safe=True)
    result = transpose.outputs[0]
    if not result.uses() and not result.is_graph_output():
        graph.remove(transpose, safe=True)
