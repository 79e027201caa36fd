"""The stamping itself: new nodes, values and names."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from itertools import chain

import onnx_ir as ir

from gap_export.exporting.stamping.align import (
    SCOPES,
    Trace,
    align,
    check_outside,
    outputs_of,
    split_trace,
)
from gap_export.exporting.stamping.labels import CACHES, Labels, unlike
from gap_export.exporting.stamping.shorten import stack_of
from gap_export.families.common.reference import Component


def stamp_layers(graph: ir.Graph, component: Component, *, root: str) -> None:
    """Turn the trace of a shortened component into that of the whole, in place.

    New nodes and values are called what torch would have gone on to call them. Of the exporter's
    metadata they have the scopes alone.

    Args:
        graph: As traced, its inputs and outputs named as the shortened component declares them.
            Where this raises, the graph is to be thrown away.
        component: The whole one.
        root: Name of the component's module in the traced one.

    Raises:
        ExportError: the second and the last layer are not the same nodes, or something reads a
            layer in a way that does not tell how it goes on in a deeper stack.
    """
    num_layers = len(stack_of(component))
    scope = f"{root}.{component.repeated}"
    labels = Labels(scope, *CACHES)
    trace = split_trace(graph, scope, num_leading=component.num_leading)
    check_outside(trace, graph.outputs, labels)
    carried = align(trace, labels)
    names = _Names(trace, labels)
    own = [
        v for v in (*graph.inputs, *graph.initializers.values()) if labels.layer(v) == trace.number
    ]

    new_nodes: list[ir.Node] = []
    new_values: list[ir.Value] = []
    previous = trace.stamp
    for layer in range(trace.number + 1, num_layers - 1):
        mine = {value: _value_like(value, labels.name(value, layer)) for value in own}
        read = mine | {value: place.of(previous) for value, place in carried.items()}
        previous = [_node_like(node, read, names, layer) for node in trace.stamp]
        for node in previous:
            node.metadata_props[SCOPES] = labels.scopes(node.metadata_props[SCOPES], layer)
        new_nodes += previous
        new_values += mine.values()
    graph.insert_after(trace.stamp[-1], new_nodes)
    for node, stamp in zip(trace.last, trace.stamp, strict=True):
        for index, value in enumerate(stamp.inputs):
            if value in carried:
                node.replace_input_with(index, carried[value].of(previous))
    _rename_last(graph, trace, labels, names, num_layers - 1)
    _complete_interface(graph, component, labels, new_values)
    seen: set[str | None] = set()
    for value in chain(graph.inputs, graph.initializers.values(), outputs_of(graph)):
        if value.name in seen:
            raise unlike("a name occurs twice", value.name)
        seen.add(value.name)


class _Names:
    """Names that count on from layer to layer as torch's do: ``linear_7``, then ``linear_14``."""

    def __init__(self, trace: Trace, labels: Labels) -> None:
        self._labels, self._number = labels, trace.number
        self._series: dict[ir.Node | ir.Value, tuple[str, int, int]] = {}
        self._strides: dict[str, int] = {}
        for stamp, last in zip(trace.stamp, trace.last, strict=True):
            pairs: list[tuple[ir.Node, ir.Node] | tuple[ir.Value, ir.Value]] = [(stamp, last)]
            pairs += zip(stamp.outputs, last.outputs, strict=True)
            for ours, theirs in pairs:
                if isinstance(ours, ir.Value) and labels.layer(ours) is not None:
                    continue
                (stem, number), (other, next_number) = _parse(ours.name), _parse(theirs.name)
                if stem != other:
                    raise unlike("a name does not count on", f"{ours.name}, then {theirs.name}")
                self._series[ours] = stem, number, next_number - number
                self._strides[stem] = next_number - number

    def of(self, ours: ir.Node | ir.Value, layer: int) -> str:
        """For a node or value of the stamp, the name of its like in another layer."""
        if isinstance(ours, ir.Value) and self._labels.layer(ours) is not None:
            return self._labels.name(ours, layer)
        stem, number, stride = self._series[ours]
        return f"{stem}_{number + (layer - self._number) * stride}"

    def later(self, name: str | None, num_layers: int) -> str | None:
        """For what was traced behind the stack: its name with so many more layers before it."""
        stem, number = _parse(name)
        if stem not in self._strides:
            return name
        return f"{stem}_{number + num_layers * self._strides[stem]}"


def _value_like(value: ir.Value, name: str) -> ir.Value:
    shape = None if value.shape is None else value.shape.copy()
    return ir.Value(name=name, shape=shape, type=copy.copy(value.type))


def _node_like(node: ir.Node, read: dict[ir.Value, ir.Value], names: _Names, layer: int) -> ir.Node:
    """A node for another layer; what it makes is added to ``read``."""
    outputs = [_value_like(value, names.of(value, layer)) for value in node.outputs]
    inputs = [None if value is None else read.get(value, value) for value in node.inputs]
    read.update(zip(node.outputs, outputs, strict=True))
    return ir.Node(
        node.domain,
        node.op_type,
        inputs,
        node.attributes.values(),
        overload=node.overload,
        outputs=outputs,
        version=node.version,
        name=names.of(node, layer),
        metadata_props={SCOPES: node.metadata_props[SCOPES]},
    )


def _rename_last(graph: ir.Graph, trace: Trace, labels: Labels, names: _Names, layer: int) -> None:
    """Give the last layer, and what comes behind it, the names they have in the whole."""
    for value in [*graph.inputs, *graph.initializers.values()]:
        if labels.layer(value) == trace.number + 1:
            value.name = labels.name(value, layer)
    for node, stamp in zip(trace.last, trace.stamp, strict=True):
        node.name = names.of(stamp, layer)
        node.metadata_props[SCOPES] = labels.scopes(node.metadata_props[SCOPES], layer)
        for value, like in zip(node.outputs, stamp.outputs, strict=True):
            value.name = names.of(like, layer)
    for node in trace.after:
        node.name = names.later(node.name, layer - trace.number - 1)
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = names.later(value.name, layer - trace.number - 1)


def _complete_interface(
    graph: ir.Graph, component: Component, labels: Labels, new_values: Iterable[ir.Value]
) -> None:
    """Add what the new layers read and make: inputs and outputs as declared, weights by layer."""
    declared = {spec.name for spec in component.inputs}
    values = {v.name: v for v in chain(graph.inputs, outputs_of(graph))}
    weights = list(graph.initializers.values())
    for value in new_values:
        if value.name in declared:
            values[value.name] = value
        else:
            weights.append(value)
    for specs in (component.inputs, component.outputs):
        for spec in specs:
            if spec.name not in values:
                raise unlike("an input or output is no layer's", spec.name)
    graph.inputs[:] = [values[spec.name] for spec in component.inputs]
    graph.outputs[:] = [values[spec.name] for spec in component.outputs]
    graph.initializers.clear()
    # The layers' weights stand where the first of them did, in the layers' order.
    layered = [value for value in weights if labels.layer(value) is not None]
    first = layered[0] if layered else None
    layered.sort(key=lambda value: labels.layer(value) or 0)
    for value in weights:
        if value is first:
            for one in layered:
                graph.initializers.add(one)
        elif labels.layer(value) is None:
            graph.initializers.add(value)


def _parse(name: str | None) -> tuple[str, int]:
    """Stem and number of a name as torch makes them; the first of a stem has no number."""
    found = re.fullmatch(r"(.+?)(?:_(\d+))?", name or "")
    assert found is not None, "torch names all nodes and values"
    return found[1], int(found[2] or 0)
