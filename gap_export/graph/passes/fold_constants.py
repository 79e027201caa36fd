"""Works out what does not depend on any input, so that a parser need not."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript.optimizer import fold_constants

from gap_export.graph.passes.graph_pass import GraphPass, fingerprint

# Elements. What is folded here are axes, shapes and scalars; anything larger stays as traced.
_SIZE_LIMIT = 64


class FoldConstants(GraphPass):
    """Replaces constant subgraphs by their value and removes nodes that nothing reads.

    torch writes the axes of a reduction as a reshaped constant; TensorRT's parser wants a constant
    there. Weights are never folded, not even small ones, nor read: a weight stays a reference.
    Does not fold ``Shape`` of a value whose shape is known, nor inside subgraphs of other domains.
    """

    def apply(self, model: ir.Model) -> bool:
        """Fold; True if anything was."""
        before = fingerprint(model)
        fold_constants(
            model,
            onnx_shape_inference=False,
            input_size_limit=_SIZE_LIMIT,
            output_size_limit=_SIZE_LIMIT,
            # False keeps a node, here one that reads a weight; None leaves it to the size limits.
            should_fold=lambda node: (
                False
                if any(v and isinstance(v.const_value, ir.ExternalTensor) for v in node.inputs)
                else None
            ),
        )
        common_passes.RemoveUnusedNodesPass()(model)
        # The folder marks what it merely visited as modified.
        return fingerprint(model) != before
