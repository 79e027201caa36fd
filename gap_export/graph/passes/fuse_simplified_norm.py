"""Makes the nodes of an RMS norm, and the sum before it, one node of ONNX Runtime's own."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter.pattern import OrValue

from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.matching import (
    CONTRIB,
    constant,
    contrib,
    describe,
    is_operator,
    like,
    new_value,
)
from gap_export.graph.passes.pattern_pass import PatternPass

NORM, SKIP_NORM = "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"


class FuseSimplifiedNorm(PatternPass):
    """Rewrites ``weight * (x / sqrt(mean(x ** 2) + eps))`` to a SimplifiedLayerNormalization.

    That is ONNX Runtime's name of the RMS norm (arXiv 1910.07467). A norm of 16-bit floats that is
    computed in float32 and cast back before the weight comes to the same node, which computes in
    float32 as well. What marks a norm is a Reciprocal of a Sqrt. Does not handle: norms over other
    axes than the last, without a weight, or with a bias.
    """

    def pattern(self, op: Any, x: Any, weight: Any, axes: Any, epsilon: Any) -> Any:
        """The norm of x [.., d] and weight [d]."""
        wide = OrValue([op.Cast(x, to=ir.DataType.FLOAT.value), x], tag_var="stays_wide")
        mean = op.ReduceMean(op.Pow(wide, 2.0), axes, _outputs=["mean"])
        scaled = op.Mul(wide, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon))))
        return op.Mul(weight, OrValue([op.Cast(scaled), scaled], tag_var="stays_narrow"))

    def replace(self, last: ir.Node, **values: Any) -> ir.Node:
        """One SimplifiedLayerNormalization."""
        x, weight, mean = (values[name] for name in ("x", "weight", "mean"))
        where, out = f"RMS norm at {last.name}", last.outputs[0]
        axes, epsilon = constant(values["axes"]), constant(values["epsilon"])
        rank = None if x.shape is None else x.shape.rank()
        keeps = mean.producer().attributes.get_int("keepdims", 1)
        if axes is None or axes.tolist() not in ([-1], [rank and rank - 1]) or not keeps:
            raise PassError(f"{where}: the mean is not over the last axis", seen=axes)
        if epsilon is None or epsilon.size != 1:
            raise PassError(f"{where}: epsilon is not one number", seen=describe(values["epsilon"]))
        one_axis = weight.is_initializer() and weight.shape is not None and weight.shape.rank() == 1
        if not one_axis or x.dtype is None or {weight.dtype, out.dtype or x.dtype} != {x.dtype}:
            raise PassError(
                f"{where}: its input and its weight are not what is handled",
                seen=f"{x.dtype}, {describe(weight)}: {weight.dtype} {weight.shape}, {out.dtype}",
                allowed="an initializer of one axis, of the dtype of the input and of the result",
            )
        settings = {"axis": -1, "epsilon": float(epsilon.reshape(())), "stash_type": 1}
        return ir.node(NORM, [x, weight], settings, outputs=[like(out)], name=last.name)

    def is_left(self, node: ir.Node) -> bool:
        """A Reciprocal of a Sqrt."""
        return is_operator(node, "Reciprocal") and is_operator(node.predecessors()[0], "Sqrt")


class FuseSkipNorm(GraphPass):
    """Rewrites ``norm(a + b)`` to a SkipSimplifiedLayerNormalization, which gives the sum as well.

    To be run after FuseSimplifiedNorm. Does not handle: sums of values of different shapes, of
    other than two or three axes, or whose result is a graph output.
    """

    def apply(self, model: ir.Model) -> bool:
        """Rewrite; True if there was such a sum."""
        modified = False
        for norm in list(model.graph):
            if not is_operator(norm, NORM):
                continue
            summed, weight = norm.inputs[0], norm.inputs[1]
            add = None if summed is None else summed.producer()
            if add is None or summed is None or not _is_residual(add):
                continue
            out, total = like(norm.outputs[0]), like(summed)
            nothing = [new_value(f"{norm.name}.{name}", None, None) for name in ("mean", "scale")]
            for value in nothing:
                value.name = ""
            settings = {"epsilon": norm.attributes["epsilon"].as_float()}
            node = contrib(
                SKIP_NORM, [*add.inputs, weight], settings, [out, *nothing, total], norm.name
            )
            node.metadata_props.update(norm.metadata_props)
            # At the sum's place: others may read it before the norm does. The weight is there.
            model.graph.insert_before(add, node)
            summed.replace_all_uses_with(total)
            norm.outputs[0].replace_all_uses_with(out, replace_graph_outputs=True)
            model.graph.remove([norm, add], safe=True)
            model.opset_imports[CONTRIB] = 1
            modified = True
        return modified


def _is_residual(node: ir.Node) -> bool:
    """A sum of two values of one shape."""
    if not is_operator(node, "Add") or node.outputs[0].is_graph_output():
        return False
    left, right = node.inputs
    if left is None or right is None or left.shape is None or right.shape is None:
        return False
    ranks = left.shape.rank(), right.shape.rank()
    # Symbols of rows may differ in name where one side was reshaped; both sides have H numbers.
    return ranks in {(2, 2), (3, 3)} and left.shape[-1] == right.shape[-1] and _not_repeated(node)


def _not_repeated(node: ir.Node) -> bool:
    """Whether no side has 1 where the other has more."""
    left, right = (value.shape for value in node.inputs if value is not None)
    return left is not None and right is not None and all(
        a == b or not (isinstance(a, int) or isinstance(b, int))
        for a, b in zip(left, right, strict=True)
    )  # fmt: skip
