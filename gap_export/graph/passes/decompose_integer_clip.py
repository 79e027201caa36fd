"""Writes Clip of integers as Max and Min: TensorRT documents Clip for floats alone."""

from __future__ import annotations

import onnx_ir as ir

from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.matching import is_operator, like, new_value, take_place

_INTEGERS = frozenset({ir.DataType.INT32, ir.DataType.INT64})


class DecomposeIntegerClip(GraphPass):
    """Rewrites ``Clip(x, low, high)`` of int32 or int64 to ``Min(Max(x, low), high)``.

    ONNX defines Clip so, also where low is above high. Does not handle: Clip of floats, without any
    bound, or inside a function.
    """

    def apply(self, model: ir.Model) -> bool:
        """Rewrite; True if there was one."""
        modified = False
        for node in list(model.graph):
            if is_operator(node, "Clip") and node.outputs[0].dtype in _INTEGERS:
                modified = _rewrite(model.graph, node) or modified
        return modified


def _rewrite(graph: ir.Graph, clip: ir.Node) -> bool:
    x, low, high = (*clip.inputs, None, None)[:3]
    bounds = [(op, bound) for op, bound in (("Max", low), ("Min", high)) if bound is not None]
    assert x is not None
    if not bounds:
        return False
    result = clip.outputs[0]
    for op_type, bound in bounds[:-1]:
        between = new_value(f"{result.name}.{op_type}", result.dtype, result.shape)
        name = f"{clip.name}.{op_type}"
        graph.insert_before(clip, ir.Node("", op_type, [x, bound], outputs=[between], name=name))
        x = between
    op_type, bound = bounds[-1]
    take_place(
        graph, clip, ir.Node("", op_type, [x, bound], outputs=[like(result)], name=clip.name)
    )
    return True
