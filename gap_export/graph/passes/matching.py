"""What passes look patterns up with, and how they say that one is not there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from gap_export.errors import PassError

HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
# The domain of ONNX Runtime's own operators.
CONTRIB = "com.microsoft"


def is_operator(node: ir.Node | None, op_type: str) -> bool:
    """Whether a node is that standard operator."""
    return node is not None and node.domain == "" and node.op_type == op_type


def contrib(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    settings: Mapping[str, Any],
    outputs: Sequence[ir.Value],
    name: str | None,
) -> ir.Node:
    """A node of one of ONNX Runtime's own operators."""
    return ir.node(op_type, inputs, settings, domain=CONTRIB, outputs=outputs, name=name)


def is_contrib(node: ir.Node | None, op_type: str) -> bool:
    """Whether a node is that operator of ONNX Runtime's own."""
    return node is not None and node.domain == CONTRIB and node.op_type == op_type


def qualified_name(node: ir.Node) -> str:
    """An operator's name, behind its domain where that is not the standard one."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def describe(value: ir.Value | None) -> str:
    """A value and where it comes from, for messages."""
    if value is None:
        return "nothing"
    node = value.producer()
    origin = "" if node is None else f" of {node.op_type} {node.name}"
    return f"{value.name}{origin}"


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The numbers of a constant or an initializer; None for any other value.

    External weights are never read and count as no numbers.
    """
    if value is None or value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        return None
    return np.asarray(tensor.numpy())


def graphs_of(model: ir.Model) -> list[ir.Graph | ir.Function]:
    """The graph of a model, and its functions."""
    return [model.graph, *model.functions.values()]


def all_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Nodes of the graph, of its subgraphs, and of the model's functions."""
    return (node for graph in graphs_of(model) for node in graph.all_nodes())


def read_slice(node: ir.Node) -> tuple[int, int, int] | None:
    """Start, end and axis of a Slice of one axis in steps of 1; None of any other."""
    numbers = [constant(value) for value in node.inputs[1:]]
    if len(numbers) < 3 or any(number is None or number.size != 1 for number in numbers):
        return None
    start, end, axis, *step = (int(number.item()) for number in numbers if number is not None)
    return (start, end, axis) if step in ([], [1]) else None


def static_dim(value: ir.Value, axis: int) -> int | None:
    """A dimension of a value, where it is known."""
    if value.shape is None or not -value.shape.rank() <= axis < value.shape.rank():
        return None
    dim = value.shape[axis]
    return dim if isinstance(dim, int) else None


def new_value(name: str | None, dtype: ir.DataType | None, shape: ir.Shape | None) -> ir.Value:
    """A value for a node to give."""
    kind = None if dtype is None else ir.TensorType(dtype)
    return ir.Value(name=name, type=kind, shape=None if shape is None else shape.copy())


def like(value: ir.Value) -> ir.Value:
    """A value of the same name, type and shape, to take its place."""
    return new_value(value.name, value.dtype, value.shape)


def add_initializer(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """A small constant of the graph's own; of two that are asked for by one name, the first.

    Raises:
        PassError: the name belongs to something else.
    """
    known = graph.initializers.get(name)
    if known is not None:
        held = constant(known)
        if held is None or held.dtype != array.dtype or not np.array_equal(held, array):
            raise PassError("a name the pass needs is taken", seen=name)
        return known
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape))
    value.const_value = tensor
    graph.register_initializer(value)
    return value


def take_place(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put a node where another was, which goes; both have one output."""
    new.metadata_props.update(old.metadata_props)
    graph.insert_before(old, new)
    old.outputs[0].replace_all_uses_with(new.outputs[0], replace_graph_outputs=True)
    graph.remove(old, safe=True)
