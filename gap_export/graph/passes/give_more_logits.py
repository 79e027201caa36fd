"""Makes a decoder give the logits of several last tokens, where it gave those of one."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.matching import (
    add_initializer,
    constant,
    is_operator,
    new_value,
    static_dim,
)

_LOGITS = "logits"
# What may stand between the last token's hidden state and its logits; each takes rows one by one.
_ROW_WISE = frozenset({"Gemm", "MatMul", "MatMulNBits", "SimplifiedLayerNormalization", "Cast"})


class GiveMoreLogits(GraphPass):
    """Rewrites ``logits [B, 1, V]`` to ``[B, min(S, count), V]``, those of the last tokens fed.

    A runtime that feeds tokens it only expects reads from them whether they were right. The hidden
    states of the last tokens are made rows for the norm and the LM head, whose weights are read
    once in any case. A head that is not a norm and one product of matrices is left as it is.

    Args:
        count: Most tokens.
    """

    def __init__(self, *, count: int) -> None:
        self._count = count

    def apply(self, model: ir.Model) -> bool:
        """Rewrite; False where the logits are not made of the last token as the pass knows it."""
        graph = model.graph
        logits = next((value for value in graph.outputs if value.name == _LOGITS), None)
        expand = None if logits is None else logits.producer()
        if logits is None or expand is None or not is_operator(expand, "Unsqueeze"):
            return False
        gather, between = _walk(expand.inputs[0])
        hidden = None if gather is None else gather.inputs[0]
        widths = [static_dim(value, -1) for value in (hidden, logits, *between) if value]
        if gather is None or hidden is None or None in widths or logits.shape is None:
            return False
        batch, width, vocabulary = logits.shape[0], widths[0], widths[1]
        assert width is not None and vocabulary is not None
        last = new_value("last_hidden", hidden.dtype, ir.Shape([batch, "num_logits", width]))
        rows = new_value("last_rows", hidden.dtype, ir.Shape(["num_rows", width]))
        for value in between:
            value.shape = ir.Shape(["num_rows", static_dim(value, -1)])
        lead = new_value("last_lead", ir.DataType.INT64, ir.Shape([2]))
        shape = new_value("logits_shape", ir.DataType.INT64, ir.Shape([3]))
        made = new_value(_LOGITS, logits.dtype, ir.Shape([batch, "num_logits", vocabulary]))

        def numbers(name: str, *values: int) -> ir.Value:
            return add_initializer(graph, name, np.array(values, dtype=np.int64))

        cut = [
            numbers("logits_from", -self._count),
            numbers("logits_to", np.iinfo(np.int64).max),
            numbers("logits_axis", 1),
        ]
        graph.insert_before(
            gather,
            [
                ir.node("Slice", [hidden, *cut], outputs=[last]),
                ir.node("Reshape", [last, numbers("rows_shape", -1, width)], outputs=[rows]),
                ir.node("Shape", [last], {"start": 0, "end": 2}, outputs=[lead]),
            ],
        )
        graph.insert_before(
            expand,
            [
                ir.node(
                    "Concat",
                    [lead, numbers("logits_width", vocabulary)],
                    {"axis": 0},
                    outputs=[shape],
                ),
                ir.node("Reshape", [expand.inputs[0], shape], outputs=[made]),
            ],
        )
        logits.name = f"{_LOGITS}.one"
        logits.replace_all_uses_with(made, replace_graph_outputs=True)
        graph.remove(expand, safe=True)
        gather.outputs[0].replace_all_uses_with(rows)
        graph.remove(gather, safe=True)
        return True


def _walk(value: ir.Value | None) -> tuple[ir.Node | None, list[ir.Value]]:
    """The Gather of the last token, if it is one, and the values between it and the logits."""
    between: list[ir.Value] = []
    while value is not None and (node := value.producer()) is not None:
        if is_operator(node, "Gather"):
            index = constant(node.inputs[1])
            if index is None or index.tolist() != -1 or node.attributes.get_int("axis", 0) != 1:
                break
            return node, between
        if node.op_type not in _ROW_WISE or len(value.uses()) > 1:
            break
        between.append(value)
        value = node.inputs[0]
    return None, between
