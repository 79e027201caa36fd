"""Makes the rotary maths on queries and keys RotaryEmbedding nodes (opset 23)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnxscript.rewriter.pattern import OrValue, Var

from gap_export.errors import PassError
from gap_export.graph.passes.matching import (
    HALF,
    add_initializer,
    constant,
    is_operator,
    like,
    new_value,
    read_slice,
    static_dim,
)
from gap_export.graph.passes.pattern_pass import PatternPass

COS_TABLE, SIN_TABLE = "rotary.cos", "rotary.sin"
_LAST = (-1, 3)


class FuseRotary(PatternPass):
    """Rewrites ``x * cos + turned(x) * sin`` to a RotaryEmbedding, by a table or by rows.

    Where a position is one number, the node is ``RotaryEmbedding(x, cos, sin, position_ids)`` with
    tables [positions, d / 2]. They are computed here as the graph does it, in float32 from whole
    numbers, and cast then: an id above 2048, which float16 cannot hold, is still exact. The node
    reads the ids that the graph's cos and sin came from, be it an input or GapRemap. An id beyond
    the table is out of the node's range: what feeds the graph must keep below it.

    Where a position has several axes (M-RoPE), frequencies of one head turn by different ids, which
    no row of a table holds. The node is ``RotaryEmbedding(x, cos, sin)`` then, with a row for each
    token, [B, S, d / 2], that the graph computes in float32 as before, once for all layers.

    Where a part of each head is rotated, x is that part. What marks the maths is a Cos. Does not
    handle: interleaved pairs, frequencies that depend on the input or are weights, several sets of
    frequencies in tables, graphs in float32.

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
        # By the half of the angles: all layers share one cos and sin. Filled anew by each run.
        self._by_token: dict[ir.Value, list[ir.Value]] = {}

    def apply(self, model: ir.Model) -> bool:
        """Rewrite; True if there was a rotation to rewrite."""
        self._by_token.clear()
        return super().apply(model)

    def pattern(self, op: Any, x: Any, ids: Any, frequencies: Any) -> Any:
        """Rotation of x [B, heads, S, d] by ids int64 [B, S] or [A, B, S], frequencies [d / 2]."""
        wide = op.Cast(ids, to=ir.DataType.FLOAT.value)
        by_axis = op.Transpose(op.Gather(ids, Var("axes"), _outputs=["chosen"]), perm=[1, 2, 0])
        numbers = op.Cast(by_axis, to=ir.DataType.FLOAT.value, _outputs=["numbers"])
        column = OrValue(
            [op.Unsqueeze(op.Unsqueeze(wide, [1]), [3]), op.Unsqueeze(numbers, [1])],
            tag_var="has_axes",
        )
        half = op.Mul(column, frequencies, _outputs=["half"])
        angles = op.Concat(half, half, _outputs=["angles"])
        cos = op.Cast(op.Cos(angles), _outputs=["cos"])
        sin = op.Cast(op.Sin(angles), _outputs=["sin"])
        low = op.Slice(x, _allow_other_inputs=True, _outputs=["low"])
        high = op.Slice(x, _allow_other_inputs=True, _outputs=["high"])
        turned = op.Concat(op.Neg(high), low, _outputs=["turned"])
        return op.Add(op.Mul(x, cos), op.Mul(turned, sin))

    def replace(self, last: ir.Node, **values: Any) -> ir.Node:
        """One RotaryEmbedding; the first adds the tables, or the rows of cos and sin."""
        x, ids, cos, sin = (values[name] for name in ("x", "ids", "cos", "sin"))
        where, has_axes = f"rotation at {last.name}", values["has_axes"] == 1
        rank = None if ids.shape is None else ids.shape.rank()
        if (ids.dtype, rank) != (ir.DataType.INT64, 3 if has_axes else 2):
            raise PassError(
                f"{where}: position ids",
                seen=f"{ids.name}, {ids.dtype} of {rank} axes",
                allowed="INT64 [batch, sequence], or [axes, batch, sequence] that are chosen from",
            )
        frequencies = constant(values["frequencies"])
        if frequencies is None or frequencies.ndim != 1 or frequencies.dtype != np.float32:
            raise PassError(f"{where}: its frequencies are not a row of float32", seen=frequencies)
        if cos.dtype not in HALF or sin.dtype != cos.dtype:
            raise PassError(f"{where}: not cast to 16-bit floats", seen=f"{cos.dtype}, {sin.dtype}")
        check_halves(values, len(frequencies), where)
        assert isinstance(last.graph, ir.Graph)
        if has_axes:
            _check_choice(values, len(frequencies), where)
            inputs = [x, *self._rows_of_tokens(last, values)]
        else:
            turns = np.arange(self._rows, dtype=np.float32)[:, None] * frequencies[None, :]
            inputs = [x, *_tables(last.graph, turns, cos.dtype), ids]
        made = [like(last.outputs[0])]
        return ir.node("RotaryEmbedding", inputs, {"interleaved": 0}, outputs=made, name=last.name)

    def is_left(self, node: ir.Node) -> bool:
        """A Cos or a Sin, but for those of which each RotaryEmbedding reads its rows."""
        if not (is_operator(node, "Cos") or is_operator(node, "Sin")):
            return False
        place = 1 if node.op_type == "Cos" else 2
        casts = [cast for cast, _ in node.outputs[0].uses()]
        return not casts or not all(
            is_operator(reader, "RotaryEmbedding") and index == place
            for cast in casts
            for reader, index in (
                cast.outputs[0].uses() if is_operator(cast, "Cast") else [(cast, 0)]
            )
        )

    def _rows_of_tokens(self, last: ir.Node, values: Mapping[str, Any]) -> list[ir.Value]:
        """Cos and sin [B, S, d / 2] of each token's own ids."""
        half, numbers, graph = values["half"], values["numbers"], last.graph
        if half in self._by_token:
            return self._by_token[half]
        assert isinstance(graph, ir.Graph)
        nodes: list[ir.Node] = []

        def add(name: str, op_type: str, inputs: list[ir.Value], to: ir.DataType) -> ir.Value:
            settings = {"to": to.value} if op_type == "Cast" else {}
            made = [new_value(f"{half.name}.{name}", to, numbers.shape)]
            nodes.append(ir.node(op_type, inputs, settings, outputs=made, name=made[0].name))
            return made[0]

        wide, narrow = ir.DataType.FLOAT, values["cos"].dtype
        angles = add("of_tokens", "Mul", [numbers, values["frequencies"]], wide)
        rows = []
        for kind in ("Cos", "Sin"):
            exact = add(f"{kind.lower()}.exact", kind, [angles], wide)
            rows.append(add(kind.lower(), "Cast", [exact], narrow))
        graph.insert_before(last, nodes)
        self._by_token[half] = rows
        return rows


def _tables(graph: ir.Graph, turns: NDArray[np.float32], dtype: ir.DataType) -> list[ir.Value]:
    """Cos and sin of each position's angles [positions, d / 2]."""
    return [
        add_initializer(graph, name, values_of(turns).astype(dtype.numpy()))
        for name, values_of in ((COS_TABLE, np.cos), (SIN_TABLE, np.sin))
    ]


def check_halves(values: Mapping[str, Any], half: int, where: str) -> None:
    """See that the first half of x turns with the second, and that they are all of it."""
    x = values["x"]
    axes = [values[name].producer().attributes["axis"].as_int() for name in ("angles", "turned")]
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


def _check_choice(values: Mapping[str, Any], half: int, where: str) -> None:
    """See that each frequency takes the ids of one axis."""
    axes, axis = constant(values["axes"]), values["chosen"].producer().attributes.get_int("axis", 0)
    if axes is None or axes.shape != (half,) or axis != 0:
        raise PassError(
            f"{where}: position axes are chosen in another way",
            seen=f"{axes} on axis {axis}",
            allowed=f"a constant of {half} numbers, one for each frequency, on axis 0",
        )
