"""Puts the GapRemap node between a decoder's ``position_ids`` input and all who read it."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir

from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import GraphPass

DOMAIN = "gap_export"
DOMAIN_VERSION = 1
OP_TYPE = "GapRemap"
POSITION_IDS = "position_ids"
KEPT_POSITIONS = "kept_positions"
ORIGINAL_POSITION_IDS = "original_position_ids"

# GatherElements and an int64 Min are older; Shape's start and end, used in the function, are not.
_MIN_OPSET = 15


class InsertGapRemap(GraphPass):
    """Adds the input ``kept_positions`` int64 [B, P] and the node that reads it.

    ``original = kept[min(slot, P-1)] + slot - min(slot, P-1)``: grounding-aware token pruning
    (arXiv 2506.21873) as one node, an ONNX local function made of standard operators. The maths is
    that of :func:`gap_export.spec.positions.gap_remap`.

    Works on any decoder with an explicit int64 ``position_ids`` [B, S] input, whoever exported it.
    Does not handle: position ids computed inside the graph, tables of several axes (M-RoPE), ids
    that are not int64. A graph output that *is* the input keeps giving out slots as fed.
    """

    name: ClassVar[str] = "InsertGapRemap"

    def apply(self, model: ir.Model) -> bool:
        """Insert the node.

        Raises:
            PassError: no usable ``position_ids`` input, nobody reads it, the node is there
                already, a name is taken, or the model's opset is too old.
        """
        graph = model.graph
        _check_not_there(graph)
        position_ids = _find_position_ids(graph)
        _check_opset(model)
        consumers = list(position_ids.uses())
        if not consumers:
            raise PassError(
                f"no node reads the input {POSITION_IDS}",
                seen="a graph that computes its position ids elsewhere",
                fix="export the decoder so that RoPE reads its position_ids input",
            )
        assert position_ids.shape is not None
        kept_positions = ir.Value(
            name=KEPT_POSITIONS,
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape([position_ids.shape[0], "prompt_length"]),
        )
        graph.inputs.insert(graph.inputs.index(position_ids) + 1, kept_positions)
        remapped = ir.Value(
            name=ORIGINAL_POSITION_IDS,
            type=ir.TensorType(ir.DataType.INT64),
            shape=position_ids.shape.copy(),
        )
        node = ir.Node(
            DOMAIN,
            OP_TYPE,
            [position_ids, kept_positions],
            outputs=[remapped],
            name=OP_TYPE,
        )
        for consumer, index in consumers:
            consumer.replace_input_with(index, remapped)
        _insert_first(graph, node)
        function = gap_remap_function(opset=model.opset_imports[""])
        model.functions[function.identifier()] = function
        model.opset_imports[DOMAIN] = DOMAIN_VERSION
        return True


def gap_remap_function(*, opset: int) -> ir.Function:
    """``GapRemap(position_ids [B, S], kept_positions [B, P])`` -> original ids [B, S], int64."""
    slots, kept = ir.Value(name=POSITION_IDS), ir.Value(name=KEPT_POSITIONS)
    one = _constant("one", [1])
    length = ir.node("Shape", [kept], attributes={"start": 1, "end": 2})
    last = ir.node("Sub", [length.outputs[0], one.outputs[0]])
    within = ir.node("Min", [slots, last.outputs[0]])
    table = ir.node("GatherElements", [kept, within.outputs[0]], attributes={"axis": 1})
    beyond = ir.node("Sub", [slots, within.outputs[0]])
    original = ir.node("Add", [table.outputs[0], beyond.outputs[0]])
    names = {
        length: "prompt_length", last: "last_entry", within: "slot_in_table",
        table: "id_in_table", beyond: "slots_beyond_table", original: ORIGINAL_POSITION_IDS,
    }  # fmt: skip
    for node, name in names.items():
        node.outputs[0].name = name
    graph = ir.Graph(
        inputs=[slots, kept],
        outputs=[original.outputs[0]],
        nodes=[one, length, last, within, table, beyond, original],
        opset_imports={"": opset},
        name=OP_TYPE,
    )
    return ir.Function(DOMAIN, OP_TYPE, graph=graph, attributes=[])


def _constant(name: str, values: list[int]) -> ir.Node:
    node = ir.node("Constant", [], attributes={"value": ir.tensor(values, dtype=ir.DataType.INT64)})
    node.outputs[0].name = name
    return node


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
            allowed=f"an int64 input {POSITION_IDS} of shape [batch, sequence]",
            fix="export the decoder with explicit position ids; a graph that builds them from the "
            "cache length cannot be mended from outside",
        )
    value = found[0]
    if value.dtype != ir.DataType.INT64 or value.shape is None or value.shape.rank() != 2:
        shape = "unknown shape" if value.shape is None else str(value.shape)
        raise PassError(
            f"the input {POSITION_IDS} is not what the pass handles",
            seen=f"{value.dtype} {shape}",
            allowed="INT64 of shape [batch, sequence]",
        )
    return value


def _check_opset(model: ir.Model) -> None:
    opset = model.opset_imports.get("")
    if opset is None or opset < _MIN_OPSET:
        raise PassError(
            "the model's opset is too old for the node",
            seen=opset,
            allowed=f">= {_MIN_OPSET}",
        )


def _insert_first(graph: ir.Graph, node: ir.Node) -> None:
    first = next(iter(graph), None)
    if first is None:
        graph.append(node)
    else:
        graph.insert_before(first, node)
