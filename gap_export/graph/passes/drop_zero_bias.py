"""Removes a convolution's bias where it is nothing but zeros."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.matching import constant, is_operator


class DropZeroBias(GraphPass):
    """Takes away the third input of a Conv that is an expanded 0.

    torch writes a convolution without bias as one with ``Expand(0, [channels])``. TensorRT's parser
    wants a bias to be an initializer, and an Expand is none. Does not handle: zeros that are
    computed in another way, and biases that are weights, of which none is read.
    """

    def apply(self, model: ir.Model) -> bool:
        """Drop; True if there was one."""
        modified = False
        for node in model.graph:
            bias = node.inputs[2] if is_operator(node, "Conv") and len(node.inputs) == 3 else None
            expand = None if bias is None else bias.producer()
            if expand is None or not is_operator(expand, "Expand"):
                continue
            number = constant(expand.inputs[0])
            if number is not None and not number.any():
                node.resize_inputs(2)
                modified = True
        if modified:
            common_passes.RemoveUnusedNodesPass()(model)
        return modified
