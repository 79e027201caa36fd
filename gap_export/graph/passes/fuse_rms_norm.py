"""Makes the nodes of an RMS norm one RMSNormalization (opset 23)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.matching import (
    constant,
    is_operator,
    like,
    other_input,
    require_constant,
    require_producer,
    require_reader,
    take_place,
)


class FuseRmsNorm(GraphPass):
    """Rewrites ``weight * cast(x32 / sqrt(mean(x32 ** 2) + eps))``, ``x32`` being x in float32.

    RMSNormalization with ``stash_type`` float32 is defined as just that (arXiv 1910.07467), down to
    where it rounds. What marks a norm is a Reciprocal of a Sqrt; each must be one, or none is
    rewritten. Does not handle: norms that are not worked out in float32 from 16-bit floats, over
    other axes than the last, without a weight, or with a bias.
    """

    name: ClassVar[str] = "FuseRmsNorm"

    def apply(self, model: ir.Model) -> bool:
        """Rewrite; True if there was a norm.

        Raises:
            PassError: a Reciprocal of a Sqrt is not part of such a norm.
        """
        marks = [node for node in model.graph if _is_mark(node)]
        for mark in marks:
            _match(mark)
        for mark in marks:
            # Once more: what one reads may be what another has given and gives no longer.
            norm = _match(mark)
            fused = ir.Node(
                "",
                "RMSNormalization",
                [norm.x, norm.weight],
                [
                    ir.AttrInt64("axis", -1),
                    ir.AttrFloat32("epsilon", norm.epsilon),
                    ir.AttrInt64("stash_type", ir.DataType.FLOAT),
                ],
                outputs=[like(norm.last.outputs[0])],
                name=norm.last.name,
            )
            take_place(model.graph, norm.last, fused)
        if marks:
            common_passes.RemoveUnusedNodesPass()(model)
        return bool(marks)


@dataclass(frozen=True, kw_only=True)
class _Norm:
    x: ir.Value
    weight: ir.Value
    epsilon: float
    last: ir.Node


def _is_mark(node: ir.Node) -> bool:
    behind = (
        node.inputs[0].producer() if is_operator(node, "Reciprocal") and node.inputs[0] else None
    )
    return is_operator(behind, "Sqrt")


def _match(reciprocal: ir.Node) -> _Norm:
    where = f"RMS norm at {reciprocal.name}"
    root = require_producer(reciprocal.inputs[0], "Sqrt", part=where)
    shifted = require_producer(root.inputs[0], "Add", part=f"{where}: what the root is taken of")
    mean = shifted.inputs[0]
    if constant(mean) is not None:
        mean = shifted.inputs[1]
    epsilon = require_constant(other_input(shifted, mean), part=f"{where}: epsilon")
    if epsilon.size != 1:
        raise PassError(f"{where}: epsilon is not one number", seen=epsilon)
    square = _mean_of(require_producer(mean, "ReduceMean", part=f"{where}: the mean"), where)
    wide = square.inputs[0]
    cast = require_producer(wide, "Cast", part=f"{where}: its input in float32")
    x = cast.inputs[0]
    assert x is not None and wide is not None
    if (
        x.dtype not in {ir.DataType.FLOAT16, ir.DataType.BFLOAT16}
        or wide.dtype != ir.DataType.FLOAT
    ):
        raise PassError(
            f"{where}: not worked out in float32 from 16-bit floats",
            seen=f"{x.dtype}, {wide.dtype}",
            allowed="FLOAT16 or BFLOAT16, FLOAT",
        )
    scaled = require_reader(reciprocal.outputs[0], "Mul", part=where)
    if other_input(scaled, reciprocal.outputs[0]) is not wide:
        raise PassError(f"{where}: it scales something else than its input", seen=scaled.name)
    narrow = require_reader(scaled.outputs[0], "Cast", part=f"{where}: its result")
    last = require_reader(narrow.outputs[0], "Mul", part=f"{where}: its result")
    weight = other_input(last, narrow.outputs[0])
    if weight is None or not weight.is_initializer() or weight.shape is None:
        raise PassError(f"{where}: its weight is not an initializer", seen=last.name)
    if (weight.shape.rank(), weight.dtype, narrow.outputs[0].dtype) != (1, x.dtype, x.dtype):
        raise PassError(
            f"{where}: its weight does not fit",
            seen=f"{weight.dtype} {weight.shape}, {narrow.outputs[0].dtype}",
            allowed=f"{x.dtype} of one axis",
        )
    return _Norm(x=x, weight=weight, epsilon=float(epsilon.reshape(())), last=last)


def _mean_of(mean: ir.Node, where: str) -> ir.Node:
    """The squares, where the mean is over the last axis and keeps it."""
    axes = require_constant(mean.inputs[1] if len(mean.inputs) > 1 else None, part=f"{where}: axes")
    square = require_producer(mean.inputs[0], "Pow", part=f"{where}: the squares")
    x = square.inputs[0]
    rank = None if x is None or x.shape is None else x.shape.rank()
    keeps = mean.attributes.get("keepdims")
    if axes.tolist() not in ([-1], [rank and rank - 1]) or (keeps and keeps.as_int() != 1):
        raise PassError(f"{where}: the mean is not over the last axis", seen=axes.tolist())
    exponent = require_constant(square.inputs[1], part=f"{where}: the exponent")
    if not np.array_equal(exponent.reshape(-1), [2]):
        raise PassError(f"{where}: the exponent", seen=exponent, allowed="2")
    return square
