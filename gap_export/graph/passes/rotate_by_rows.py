"""Makes the rotary maths on queries and keys RotaryEmbedding nodes of ONNX Runtime's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript.rewriter.pattern import OrValue

from gap_export.errors import PassError
from gap_export.graph.passes.fuse_rotary import check_halves
from gap_export.graph.passes.matching import (
    CONTRIB,
    add_initializer,
    contrib,
    is_contrib,
    is_operator,
    like,
    new_value,
    read_slice,
    static_dim,
    take_place,
)
from gap_export.graph.passes.pattern_pass import PatternPass

ROTARY = "RotaryEmbedding"
_LAST = (-1, 3)


class RotateByRows(PatternPass):
    """Rewrites ``x * cos + turned(x) * sin`` to ``RotaryEmbedding(x, numbers, cos, sin)``.

    ONNX Runtime's node takes rows of cos and sin from tables [rows, d / 2] by number. The tables
    here have a row for each fed token, computed once for all layers as the graph does it, in
    float32 from the ids that GapRemap gives, and the numbers are 0, 1, 2, ... of these rows. So no
    table of all positions is stored, no id is out of range, and positions of several axes (M-RoPE)
    need nothing of their own.

    Where a part of each head is rotated and joined with the rest, the node does so itself. What
    marks the maths is a Cos. Does not handle: interleaved pairs; heads that are not [B, heads, S,
    d] where angles are [B, 1, S, d / 2].
    """

    def __init__(self) -> None:
        # By the half of the angles: all layers share one cos and sin. Filled anew by each run.
        self._rows: dict[ir.Value, list[ir.Value]] = {}

    def apply(self, model: ir.Model) -> bool:
        """Rewrite; True if there was a rotation to rewrite."""
        self._rows.clear()
        modified = super().apply(model)
        if modified:
            model.opset_imports[CONTRIB] = 1
        joins = [_join_rest(model.graph, node) for node in list(model.graph)]
        if any(joins):
            common_passes.RemoveUnusedNodesPass()(model)
        return modified or any(joins)

    def pattern(self, op: Any, x: Any, half: Any) -> Any:
        """Rotation of x [B, heads, S, d] by angles of which [B, 1, S, d / 2] are the half."""
        angles = op.Concat(half, half, _outputs=["angles"])
        turns = [op.Cos(angles), op.Sin(angles)]
        cos, sin = (
            OrValue([op.Cast(wide), wide], tag_var=f"{name}_stays", name=name)
            for name, wide in zip(("cos", "sin"), turns, strict=True)
        )
        low = op.Slice(x, _allow_other_inputs=True, _outputs=["low"])
        high = op.Slice(x, _allow_other_inputs=True, _outputs=["high"])
        turned = op.Concat(op.Neg(high), low, _outputs=["turned"])
        return op.Add(op.Mul(x, cos), op.Mul(turned, sin))

    def replace(self, last: ir.Node, **values: Any) -> ir.Node:
        """One RotaryEmbedding; the first adds the rows."""
        x, half = values["x"], values["half"]
        where, width = f"rotation at {last.name}", static_dim(half, -1)
        ranks = [None if value.shape is None else value.shape.rank() for value in (x, half)]
        if ranks != [4, 4] or half.shape[1] != 1 or width is None or half.shape[2] != x.shape[2]:
            raise PassError(
                f"{where}: angles are not those of each token",
                seen=f"heads {x.shape}, angles {half.shape}",
                allowed="[B, heads, S, d] and [B, 1, S, d / 2]",
            )
        check_halves(values, width, where)
        inputs = [x, *self._rows_of_tokens(last, values)]
        made = [like(last.outputs[0])]
        return contrib(ROTARY, inputs, {"interleaved": 0}, made, last.name)

    def is_left(self, node: ir.Node) -> bool:
        """A Cos or a Sin, but for those that a RotaryEmbedding reads its rows of."""
        if not (is_operator(node, "Cos") or is_operator(node, "Sin")):
            return False
        waiting, seen = [node.outputs[0]], False
        while waiting:
            for reader, index in waiting.pop().uses():
                if is_operator(reader, "Cast") or is_operator(reader, "Reshape"):
                    waiting.append(reader.outputs[0])
                elif is_contrib(reader, ROTARY) and index > 1:
                    seen = True
                else:
                    return True
        return not seen

    def _rows_of_tokens(self, last: ir.Node, values: Mapping[str, Any]) -> list[ir.Value]:
        """The rows' numbers int64 [B, S], and cos and sin [B * S, d / 2]."""
        half, graph, dtype = values["half"], last.graph, values["x"].dtype
        if half in self._rows:
            return self._rows[half]
        assert isinstance(graph, ir.Graph)
        nodes: list[ir.Node] = []

        def add(
            name: str, op_type: str, inputs: list[ir.Value], kind: ir.DataType,
            shape: list[Any], **settings: int,
        ) -> ir.Value:  # fmt: skip
            made = [new_value(f"{half.name}.{name}", kind, ir.Shape(shape))]
            nodes.append(ir.node(op_type, inputs, settings, outputs=made, name=made[0].name))
            return made[0]

        whole, wide, width = ir.DataType.INT64, ir.DataType.FLOAT, half.shape[3]
        zero, one = (add_initializer(graph, f"rotary.{n}", np.array(n)) for n in (0, 1))
        rows = add("rows", "Shape", [half], whole, [1], start=0, end=1)
        tokens = add("tokens", "Shape", [half], whole, [1], start=2, end=3)
        size = add("size", "Concat", [rows, tokens], whole, [2], axis=0)
        count = add("count", "ReduceProd", [size], whole, [], keepdims=0)
        numbers = add("number", "Range", [zero, count, one], whole, [None])
        batch = [half.shape[0], half.shape[2]]
        found = [add("number_of_token", "Reshape", [numbers, size], whole, batch)]
        flat = add_initializer(graph, f"rotary.rows_of_{width}", np.array([-1, width]))
        angles = add("of_tokens", "Reshape", [half, flat], wide, [None, width])
        for kind in ("Cos", "Sin"):
            row = add(kind.lower(), kind, [angles], wide, [None, width])
            if dtype != wide:
                row = add(
                    f"{kind.lower()}.cast", "Cast", [row], dtype, [None, width], to=dtype.value
                )
            found.append(row)
        graph.insert_before(last, nodes)
        self._rows[half] = found
        return found


def _join_rest(graph: ir.Graph, join: ir.Node) -> bool:
    """Have a RotaryEmbedding of the first channels take whole heads; True if ``join`` was one."""
    if not is_operator(join, "Concat") or len(join.inputs) != 2:
        return False
    turned, rest = join.predecessors() if len(join.predecessors()) == 2 else (None, None)
    if turned is None or rest is None or not is_contrib(turned, ROTARY):
        return False
    part = turned.inputs[0]
    first = None if part is None else part.producer()
    if first is None or not is_operator(first, "Slice") or not is_operator(rest, "Slice"):
        return False
    heads, cuts = first.inputs[0], (read_slice(first), read_slice(rest))
    if part is None or heads is None or rest.inputs[0] is not heads:
        return False
    width, whole, many = static_dim(part, 3), static_dim(heads, 3), static_dim(heads, 1)
    if None in (width, whole, many, *cuts) or join.attributes["axis"].as_int() not in _LAST:
        return False
    spans = [(cut[0], min(cut[1], whole or 0), cut[2] in _LAST) for cut in cuts if cut]
    if spans != [(0, width, True), (width, whole, True)]:
        return False
    settings = {"interleaved": 0, "num_heads": many, "rotary_embedding_dim": width}
    made, inputs = [like(join.outputs[0])], [heads, *turned.inputs[1:]]
    take_place(graph, join, contrib(ROTARY, inputs, settings, made, turned.name))
    return True
