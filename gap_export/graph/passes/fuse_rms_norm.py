"""Makes the nodes of an RMS norm one RMSNormalization (opset 23)."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from gap_export.errors import PassError
from gap_export.graph.passes.matching import HALF, constant, describe, is_operator, like
from gap_export.graph.passes.pattern_pass import PatternPass


class FuseRmsNorm(PatternPass):
    """Rewrites ``weight * cast(x32 / sqrt(mean(x32 ** 2) + eps))``, ``x32`` being x in float32.

    RMSNormalization with ``stash_type`` float32 is defined as just that (arXiv 1910.07467), down to
    where it rounds. What marks a norm is a Reciprocal of a Sqrt. Does not handle: norms that are
    not computed in float32 from 16-bit floats, over other axes than the last, without a weight, or
    with a bias.
    """

    def pattern(self, op: Any, x: Any, weight: Any, axes: Any, epsilon: Any) -> Any:
        """The norm of x [.., d] and weight [d]."""
        wide = op.Cast(x, to=ir.DataType.FLOAT.value)
        mean = op.ReduceMean(op.Pow(wide, 2.0), axes, _outputs=["mean"])
        scaled = op.Mul(wide, op.Reciprocal(op.Sqrt(op.Add(mean, epsilon))))
        return op.Mul(weight, op.Cast(scaled, _outputs=["narrow"]))

    def replace(self, last: ir.Node, **values: Any) -> ir.Node:
        """One RMSNormalization."""
        x, weight, mean, narrow = (values[name] for name in ("x", "weight", "mean", "narrow"))
        where = f"RMS norm at {last.name}"
        axes, epsilon = constant(values["axes"]), constant(values["epsilon"])
        rank = None if x.shape is None else x.shape.rank()
        keeps = mean.producer().attributes.get_int("keepdims", 1)
        if axes is None or axes.tolist() not in ([-1], [rank and rank - 1]) or not keeps:
            raise PassError(f"{where}: the mean is not over the last axis", seen=axes)
        if epsilon is None or epsilon.size != 1:
            raise PassError(f"{where}: epsilon is not one number", seen=describe(values["epsilon"]))
        fits = weight.is_initializer() and weight.shape is not None and weight.shape.rank() == 1
        if not fits or x.dtype not in HALF or {weight.dtype, narrow.dtype} != {x.dtype}:
            raise PassError(
                f"{where}: its input and its weight are not what is handled",
                seen=f"{x.dtype}, {describe(weight)}: {weight.dtype} {weight.shape}",
                allowed="FLOAT16 or BFLOAT16, and an initializer of one axis and the same dtype",
            )
        stash, made = ir.DataType.FLOAT.value, [like(last.outputs[0])]
        settings = {"axis": -1, "epsilon": float(epsilon.reshape(())), "stash_type": stash}
        return ir.node("RMSNormalization", [x, weight], settings, outputs=made, name=last.name)

    def is_left(self, node: ir.Node) -> bool:
        """A Reciprocal of a Sqrt."""
        return is_operator(node, "Reciprocal") and is_operator(node.predecessors()[0], "Sqrt")
