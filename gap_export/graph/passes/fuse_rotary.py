"""Makes the rotary maths on queries and keys RotaryEmbedding nodes (opset 23) with a table."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from gap_export.errors import PassError
from gap_export.graph.passes.matching import (
    HALF,
    add_initializer,
    constant,
    is_operator,
    like,
    read_slice,
    static_dim,
)
from gap_export.graph.passes.pattern_pass import PatternPass

COS_TABLE, SIN_TABLE = "rotary.cos", "rotary.sin"
_LAST = (-1, 3)


class FuseRotary(PatternPass):
    """Rewrites ``x * cos + turned(x) * sin`` to ``RotaryEmbedding(x, cos, sin, position_ids)``.

    The tables [positions, d / 2] are computed here as the graph does it, in float32 from whole
    numbers, and cast then: an id above 2048, which float16 cannot hold, is still exact. The node
    reads the ids that the graph's cos and sin came from, be it an input or GapRemap. An id beyond
    the table is out of the node's range: what feeds the graph must keep below it. Where a
    part of each head is rotated, x is that part.

    What marks the maths is a Cos. Does not handle: interleaved pairs, frequencies that depend on
    the input or are weights, several sets of frequencies, several position axes (M-RoPE), graphs
    in float32.

    Args:
        max_position_embeddings: Rows of the tables: ids are below it.
    """

    def __init__(self, *, max_position_embeddings: int) -> None:
        if max_position_embeddings < 1:
            raise PassError(
                "a table of cos and sin has a row for each position",
                seen=max_position_embeddings,
                allowed="1 or more",
            )
        self._rows = max_position_embeddings

    def pattern(self, op: Any, x: Any, ids: Any, frequencies: Any) -> Any:
        """Rotation of x [B, heads, S, d], ids int64 [B, S] and frequencies [d / 2]."""
        column = op.Unsqueeze(op.Unsqueeze(op.Cast(ids, to=ir.DataType.FLOAT.value), [1]), [3])
        half = op.Mul(column, frequencies)
        angles = op.Concat(half, half, _outputs=["angles"])
        cos = op.Cast(op.Cos(angles), _outputs=["cos"])
        sin = op.Cast(op.Sin(angles), _outputs=["sin"])
        low = op.Slice(x, _allow_other_inputs=True, _outputs=["low"])
        high = op.Slice(x, _allow_other_inputs=True, _outputs=["high"])
        turned = op.Concat(op.Neg(high), low, _outputs=["turned"])
        return op.Add(op.Mul(x, cos), op.Mul(turned, sin))

    def replace(self, last: ir.Node, **values: Any) -> ir.Node:
        """One RotaryEmbedding; the first adds the tables."""
        x, ids, cos, sin = (values[name] for name in ("x", "ids", "cos", "sin"))
        where = f"rotation at {last.name}"
        rank = None if ids.shape is None else ids.shape.rank()
        if (ids.dtype, rank) != (ir.DataType.INT64, 2):
            raise PassError(
                f"{where}: position ids",
                seen=f"{ids.name}, {ids.dtype} of {rank} axes",
                allowed="INT64 [batch, sequence]",
            )
        frequencies = constant(values["frequencies"])
        if frequencies is None or frequencies.ndim != 1 or frequencies.dtype != np.float32:
            raise PassError(f"{where}: its frequencies are not a row of float32", seen=frequencies)
        if cos.dtype not in HALF or sin.dtype != cos.dtype:
            raise PassError(f"{where}: not cast to 16-bit floats", seen=f"{cos.dtype}, {sin.dtype}")
        half = len(frequencies)
        axes = [
            values[name].producer().attributes["axis"].as_int() for name in ("angles", "turned")
        ]
        halves = []
        for name in ("low", "high"):
            start, end, axis = read_slice(values[name].producer()) or (None, 0, 0)
            axes.append(axis)
            # torch writes "to the end" as the largest integer.
            halves.append((start, min(end, 2 * half)))
        wanted = [(0, half), (half, 2 * half)]
        if static_dim(x, 3) != 2 * half or halves != wanted or not set(axes) <= set(_LAST):
            raise PassError(
                f"{where}: it turns other halves",
                seen=f"{halves} of width {static_dim(x, 3)}, on axes {axes}",
                allowed=f"{wanted} of width {2 * half}, on the last axis",
            )
        turns = np.arange(self._rows, dtype=np.float32)[:, None] * frequencies[None, :]
        dtype = cos.dtype.numpy()
        assert isinstance(last.graph, ir.Graph)
        tables = [
            add_initializer(last.graph, name, values_of(turns).astype(dtype))
            for name, values_of in ((COS_TABLE, np.cos), (SIN_TABLE, np.sin))
        ]
        made, inputs = [like(last.outputs[0])], [x, *tables, ids]
        return ir.node("RotaryEmbedding", inputs, {"interleaved": 0}, outputs=made, name=last.name)

    def is_left(self, node: ir.Node) -> bool:
        """A Cos or a Sin."""
        return is_operator(node, "Cos") or is_operator(node, "Sin")
