"""Turns a decoder's growing KV cache into buffers that are written in place (TensorScatter, 24)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.matching import (
    add_initializer,
    is_operator,
    like,
    new_value,
    static_dim,
    take_place,
)

PAST = re.compile(r"past_key_values\.\d+\.(key|value)")
_ATTENTION_MASK, _POSITION_IDS = "attention_mask", "position_ids"
_SLOTS = 2  # axis of past and present


class UpdateCacheInPlace(GraphPass):
    """Rewrites ``present = Concat(past, new)`` to writing ``new`` into a buffer of fixed capacity.

    Inputs ``past_key_values.{i}.key`` and ``.value`` and outputs ``present.{i}.*`` become
    [B, heads, capacity, d]. The new keys go to slots past .. past + S - 1, with past = T - S from
    the shapes of ``attention_mask`` [B, T] and ``position_ids`` [B, S]; attention reads slots
    0 .. T - 1, cut out, so that what a buffer holds beyond them is never looked at, not even
    multiplied by 0. The capacity is a number and no symbol: TensorRT demands that of a cache.

    Does not handle: caches that are concatenated on another axis, whose length is used otherwise
    than by Shape, a past that no node extends, rings, rows of different past lengths.

    Args:
        capacity: Slots of each buffer.
    """

    def __init__(self, *, capacity: int) -> None:
        if capacity < 1:
            raise PassError("a cache has slots", seen=capacity, allowed="1 or more")
        self._capacity = capacity

    def apply(self, model: ir.Model) -> bool:
        """Rewrite; False where there is no cache, or all are written in place already.

        Raises:
            PassError: an input or a reader of a cache is not what the pass handles.
        """
        graph = model.graph
        pasts = [value for value in graph.inputs if PAST.fullmatch(value.name or "")]
        written = [
            static_dim(past, _SLOTS) is not None
            and any(is_operator(node, "TensorScatter") for node, _ in past.uses())
            for past in pasts
        ]
        if all(written):
            return False
        caches = [(past, *_match(past)) for past in pasts]
        mask, ids = _input(graph, _ATTENTION_MASK), _input(graph, _POSITION_IDS)
        lengths = _insert_lengths(graph, mask, ids)
        for past, concat, measured in caches:
            self._rewrite(graph, past, concat, measured, lengths)
        common_passes.RemoveUnusedNodesPass()(model)
        return True

    def _rewrite(
        self,
        graph: ir.Graph,
        past: ir.Value,
        concat: ir.Node,
        measured: list[ir.Node],
        lengths: _Lengths,
    ) -> None:
        for shape in measured:
            made, past_length = [like(shape.outputs[0])], [lengths.total, lengths.fed]
            node = ir.node("Sub", past_length, outputs=made, name=shape.name)
            take_place(graph, shape, node)
        grown = concat.outputs[0]
        assert past.shape is not None and grown.shape is not None
        past.shape = _with_slots(past.shape, self._capacity)
        buffer = new_value(grown.name, grown.dtype, _with_slots(grown.shape, self._capacity))
        scatter = ir.node(
            "TensorScatter",
            [past, concat.inputs[1], lengths.write_at],
            # Counted from the end: the one spelling that TensorRT's documents allow.
            {"axis": _SLOTS - 4, "mode": "linear"},
            outputs=[buffer],
            name=concat.name,
        )
        valid = new_value(f"{grown.name}.valid", grown.dtype, grown.shape)
        slots = [buffer, lengths.zero, lengths.total, lengths.axis]
        cut = ir.node("Slice", slots, outputs=[valid], name=f"{concat.name}.valid")
        graph.insert_before(concat, [scatter, cut])
        for index, output in enumerate(graph.outputs):
            if output is grown:
                graph.outputs[index] = buffer
        grown.replace_all_uses_with(valid)
        graph.remove(concat, safe=True)


@dataclass(frozen=True, kw_only=True)
class _Lengths:
    """All int64 [1], but ``write_at`` int64 [B]: the first slot written, of each row."""

    total: ir.Value
    fed: ir.Value
    write_at: ir.Value
    zero: ir.Value
    axis: ir.Value


def _match(past: ir.Value) -> tuple[ir.Node, list[ir.Node]]:
    """The Concat that extends a cache, and the nodes that measure its length."""
    concats, lengths = [], []
    for node, _ in past.uses():
        if is_operator(node, "Concat"):
            concats.append(node)
        elif not is_operator(node, "Shape"):
            raise PassError(
                f"the cache {past.name} is read otherwise than to extend and measure it",
                seen=f"{node.op_type} {node.name}",
                allowed="Concat, Shape",
            )
        else:
            # Batch, heads and width do not change: a Shape of these alone may stay.
            start, end = (node.attributes.get_int(k, d) for k, d in (("start", 0), ("end", 4)))
            measured = range(4)[start:end]
            if _SLOTS in measured and len(measured) > 1:
                raise PassError(
                    f"the length of the cache {past.name} is read along with other sizes",
                    seen=f"Shape {node.name} {start}:{end}",
                    allowed=f"Shape {_SLOTS}:{_SLOTS + 1}",
                )
            lengths += [node] if _SLOTS in measured else []
    if len(concats) != 1 or past.shape is None or past.shape.rank() != 4:
        raise PassError(
            f"the cache {past.name} is not extended once",
            seen=f"{len(concats)} Concat, shape {past.shape}",
            allowed="1 Concat, [batch, heads, slots, width]",
        )
    (concat,) = concats
    axis = concat.attributes["axis"].as_int()
    grown = concat.outputs[0]
    extends = len(concat.inputs) == 2 and concat.inputs[0] is past
    if axis not in {_SLOTS, _SLOTS - 4} or not extends or not grown.is_graph_output():
        raise PassError(
            f"the cache {past.name} is not extended by what is new behind it",
            seen=f"Concat {concat.name}, axis {axis}, {len(concat.inputs)} inputs",
            allowed=f"Concat(past, new) on axis {_SLOTS}, a graph output",
        )
    return concat, lengths


def _input(graph: ir.Graph, name: str) -> ir.Value:
    for value in graph.inputs:
        rank = None if value.shape is None else value.shape.rank()
        if (value.name, value.dtype, rank) == (name, ir.DataType.INT64, 2):
            return value
    raise PassError(
        f"the decoder has no int64 input {name} of two axes",
        seen="inputs " + ", ".join(str(value.name) for value in graph.inputs),
    )


def _insert_lengths(graph: ir.Graph, mask: ir.Value, ids: ir.Value) -> _Lengths:
    nodes: list[ir.Node] = []

    def add(name: str, op_type: str, inputs: list[ir.Value], **attributes: int) -> ir.Value:
        length = 1 if name != "cache.write_at" else None
        assert mask.shape is not None
        out = new_value(name, ir.DataType.INT64, ir.Shape([length or mask.shape[0]]))
        nodes.append(ir.node(op_type, inputs, attributes, outputs=[out], name=name))
        return out

    total = add("cache.total_length", "Shape", [mask], start=1, end=2)
    fed = add("cache.fed_length", "Shape", [ids], start=1, end=2)
    rows = add("cache.rows", "Shape", [mask], start=0, end=1)
    past = add("cache.past_length", "Sub", [total, fed])
    lengths = _Lengths(
        total=total,
        fed=fed,
        write_at=add("cache.write_at", "Expand", [past, rows]),
        zero=add_initializer(graph, "cache.first_slot", np.array([0])),
        axis=add_initializer(graph, "cache.axis", np.array([_SLOTS])),
    )
    graph.insert_before(graph[0], nodes)
    return lengths


def _with_slots(shape: ir.Shape, capacity: int) -> ir.Shape:
    return ir.Shape([capacity if axis == _SLOTS else dim for axis, dim in enumerate(shape)])
