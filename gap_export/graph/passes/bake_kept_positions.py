"""Makes ``kept_positions`` a constant, so that ``position_ids`` are all that a runtime feeds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.insert_gap_remap import KEPT_POSITIONS, POSITION_IDS
from gap_export.graph.passes.matching import add_initializer, new_value
from gap_export.spec.positions import Int64Array


class BakeKeptPositions(GraphPass):
    """Replaces the input ``kept_positions`` by a table that all rows of all prompts share.

    The node GapRemap stays and reads the table, repeated for each row of ``position_ids``. To be
    run after InsertGapRemap. Does not handle: a graph whose input was taken away before.

    Args:
        table: int64 [P], or [A, P] where positions have several axes: the ids of a prompt's tokens
            up to the first behind the image. Those behind it follow one by one, as GapRemap has it.
    """

    def __init__(self, table: Int64Array) -> None:
        self._table = table

    def apply(self, model: ir.Model) -> bool:
        """Replace the input.

        Raises:
            PassError: there is none, or it has another number of axes.
        """
        graph = model.graph
        inputs = {value.name: value for value in graph.inputs}
        fed, slots = inputs.get(KEPT_POSITIONS), inputs.get(POSITION_IDS)
        rank = None if fed is None or fed.shape is None else fed.shape.rank()
        if fed is None or slots is None or rank != self._table.ndim + 1:
            raise PassError(
                f"the decoder has no input {KEPT_POSITIONS} to make a constant of",
                seen=f"inputs {', '.join(map(str, inputs))}; a table of {self._table.ndim} axes",
                fix="run InsertGapRemap before",
            )
        table = self._table[..., None, :]
        held = add_initializer(graph, f"{KEPT_POSITIONS}.table", table)
        axes = add_initializer(
            graph, f"{KEPT_POSITIONS}.axes", np.array(table.shape[:-2], np.int64)
        )
        length = add_initializer(graph, f"{KEPT_POSITIONS}.length", np.array([table.shape[-1]]))
        rows = new_value(f"{KEPT_POSITIONS}.rows", ir.DataType.INT64, ir.Shape([1]))
        shape = new_value(f"{KEPT_POSITIONS}.shape", ir.DataType.INT64, ir.Shape([rank]))
        assert fed.shape is not None
        dims = ir.Shape([*fed.shape[:-1], table.shape[-1]])
        repeated = new_value(f"{KEPT_POSITIONS}.of_rows", ir.DataType.INT64, dims)
        nodes = [
            ir.node("Shape", [slots], {"start": 0, "end": 1}, outputs=[rows], name=rows.name),
            ir.node("Concat", [axes, rows, length], {"axis": 0}, outputs=[shape], name=shape.name),
            ir.node("Expand", [held, shape], outputs=[repeated], name=repeated.name),
        ]
        fed.replace_all_uses_with(repeated)
        graph.inputs.remove(fed)
        graph.insert_before(graph[0], nodes)
        return True
