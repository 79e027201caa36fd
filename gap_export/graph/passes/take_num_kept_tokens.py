"""The number of kept tokens as an input of its own, instead of the length of another input."""

from __future__ import annotations

import onnx_ir as ir

from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import GraphPass

_SLOTS, _NUMBER = "kept_slots", "num_kept_tokens"


class TakeNumKeptTokens(GraphPass):
    """Replaces the input ``kept_slots`` [K] by ``num_kept_tokens`` int64 [1] that holds K.

    PyTorch knows a size that is not fixed only as the length of some input. Runtimes are better
    served by the number: it is what TopK takes.

    Does not handle a graph that reads more of ``kept_slots`` than its length.
    """

    def apply(self, model: ir.Model) -> bool:
        """Replace the input."""
        graph = model.graph
        slots = next((value for value in graph.inputs if value.name == _SLOTS), None)
        if slots is None:
            return False
        readers = [node for node, _ in slots.uses()]
        strange = [node.op_type for node in readers if node.op_type != "Shape"]
        if strange or not readers:
            raise PassError(
                f"{type(self).__name__}: {_SLOTS} is read for more than its length",
                seen=", ".join(strange) or "read by no node",
                allowed="Shape",
            )
        number = ir.Value(name=_NUMBER, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
        graph.inputs[graph.inputs.index(slots)] = number
        for node in readers:
            ir.convenience.replace_all_uses_with(node.outputs[0], number)
            graph.remove(node, safe=True)
        return True
