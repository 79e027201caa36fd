"""Puts the GapRemap node between a decoder's ``position_ids`` input and all who read it."""

from __future__ import annotations

from typing import Literal

import onnx_ir as ir

from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.matching import new_value

DOMAIN = "gap_export"
DOMAIN_VERSION = 1
OP_TYPE = "GapRemap"
POSITION_IDS = "position_ids"
KEPT_POSITIONS = "kept_positions"
ORIGINAL_POSITION_IDS = "original_position_ids"

# GatherElements and an int64 Min are older; Shape's start and end, used in the function, are not.
_MIN_OPSET = 15
_ALLOWED = "[batch, sequence], or [3, batch, sequence] with M-RoPE"


class InsertGapRemap(GraphPass):
    """Adds the input ``kept_positions`` and the node that reads it.

    ``original = kept[min(slot, P-1)] + slot - min(slot, P-1)``: grounding-aware token pruning
    (arXiv 2506.21873) as one node, an ONNX local function made of standard operators. The maths is
    that of :func:`gap_export.spec.positions.gap_remap`.

    Works on any decoder with an explicit int64 ``position_ids`` input, of any exporter. Where
    that is [B, S], ``kept_positions`` is [B, P]. Where it is [3, B, S] (M-RoPE), ``kept_positions``
    is [3, B, P], and the input becomes [B, S]: slots have one axis.
    Does not handle: position ids computed inside the graph, another number of axes, ids that are
    not int64. A graph output that *is* the input gives out slots as fed.
    """

    def apply(self, model: ir.Model) -> bool:
        """Insert the node.

        Raises:
            PassError: no usable ``position_ids`` input, no node reads it, the node is there
                already, a name is taken, or the model's opset is too old.
        """
        graph = model.graph
        _check_not_there(graph)
        position_ids = _find_position_ids(graph)
        opset = model.opset_imports.get("")
        if opset is None or opset < _MIN_OPSET:
            raise PassError(
                "the model's opset is too old for the node",
                seen=opset,
                allowed=f">= {_MIN_OPSET}",
            )
        consumers = list(position_ids.uses())
        if not consumers:
            raise PassError(
                f"no node reads the input {POSITION_IDS}",
                seen="a graph that computes its position ids elsewhere",
                fix="export the decoder so that RoPE reads its position_ids input",
            )
        ids_shape = position_ids.shape
        assert ids_shape is not None
        *axes, batch, length = ids_shape
        table = ir.Shape([*axes, batch, "prompt_length"])
        kept_positions = new_value(KEPT_POSITIONS, ir.DataType.INT64, table)
        graph.inputs.insert(graph.inputs.index(position_ids) + 1, kept_positions)
        remapped = new_value(ORIGINAL_POSITION_IDS, ir.DataType.INT64, ids_shape)
        if axes:
            position_ids.shape = ir.Shape([batch, length])
        read = [position_ids, kept_positions]
        node = ir.Node(DOMAIN, OP_TYPE, read, outputs=[remapped], name=OP_TYPE)
        for consumer, index in consumers:
            consumer.replace_input_with(index, remapped)
        graph.insert_before(next(iter(graph)), node)
        function = gap_remap_function(opset=opset, has_axes=bool(axes))
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = DOMAIN_VERSION
        return True


def gap_remap_function(*, opset: int, has_axes: bool = False) -> ir.Function:
    """``GapRemap(position_ids [B, S], kept_positions)`` -> original ids, int64.

    Args:
        opset: The model's opset.
        has_axes: ``kept_positions`` is [A, B, P] and the result [A, B, S]; else they are [B, P] and
            [B, S].
    """
    slots, kept = ir.Value(name=POSITION_IDS), ir.Value(name=KEPT_POSITIONS)
    nodes: list[ir.Node] = []

    def add(op_type: str, name: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        node = ir.node(op_type, inputs, attributes=attributes)  # type: ignore[arg-type]
        node.outputs[0].name = name
        nodes.append(node)
        return node.outputs[0]

    axis = 2 if has_axes else 1
    one = add("Constant", "one", value=ir.tensor([1], dtype=ir.DataType.INT64))
    length = add("Shape", "prompt_length", kept, start=axis, end=axis + 1)
    last = add("Sub", "last_entry", length, one)
    places = within = add("Min", "slot_in_table", slots, last)
    if has_axes:
        num_axes = add("Shape", "num_axes", kept, start=0, end=1)
        each = add("Concat", "shape_on_all_axes", num_axes, add("Shape", "shape", slots), axis=0)
        places = add("Expand", "slot_on_all_axes", within, each)
    table = add("GatherElements", "id_in_table", kept, places, axis=axis)
    beyond = add("Sub", "slots_beyond_table", slots, within)
    original = add("Add", ORIGINAL_POSITION_IDS, table, beyond)
    graph = ir.Graph(
        inputs=[slots, kept],
        outputs=[original],
        nodes=nodes,
        opset_imports={"": opset},
        name=OP_TYPE,
    )
    return ir.Function(DOMAIN, OP_TYPE, graph=graph, attributes=[])


def position_axes(position_ids: ir.Value) -> Literal[1, 3] | None:
    """How many ids of a token a decoder's input holds, by its shape; None for what is not known."""
    shape = position_ids.shape
    if shape is None or shape.rank() not in (2, 3):
        return None
    if shape.rank() == 2:
        return 1
    return 3 if shape[0] == 3 else None


def _check_not_there(graph: ir.Graph) -> None:
    if any(node.domain == DOMAIN and node.op_type == OP_TYPE for node in graph):
        raise PassError(
            f"the graph has a {OP_TYPE} node already",
            fix="run the pass on the graph as it was exported",
        )
    taken = {value.name for value in graph.inputs} | set(graph.initializers)
    taken |= {value.name for node in graph for value in node.outputs}
    for name in (KEPT_POSITIONS, ORIGINAL_POSITION_IDS):
        if name in taken:
            raise PassError("a name the pass needs is taken", seen=name)


def _find_position_ids(graph: ir.Graph) -> ir.Value:
    found = [value for value in graph.inputs if value.name == POSITION_IDS]
    if not found:
        raise PassError(
            f"the graph has no input called {POSITION_IDS}",
            seen="inputs " + ", ".join(str(value.name) for value in graph.inputs),
            allowed=f"an int64 input {POSITION_IDS} of shape {_ALLOWED}",
            fix="export the decoder with explicit position ids; a graph that builds them from the "
            "cache length cannot be mended from outside",
        )
    value = found[0]
    if value.dtype != ir.DataType.INT64 or position_axes(value) is None:
        shape = "unknown shape" if value.shape is None else str(value.shape)
        raise PassError(
            f"the input {POSITION_IDS} is not what the pass handles",
            seen=f"{value.dtype} {shape}",
            allowed=f"INT64 of shape {_ALLOWED}",
        )
    return value
