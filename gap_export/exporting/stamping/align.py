"""What a trace of three layers tells about the layers between the second and the third."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import onnx_ir as ir

from gap_export.exporting.stamping.labels import Labels, unlike
from gap_export.exporting.stamping.shorten import NUM_TRACED

# Here torch's exporter notes the module a node is from, and the modules around it.
SCOPES = "pkg.torch.onnx.name_scopes"
_SUBGRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


class Place(NamedTuple):
    """Where a layer makes a value: number of the node, number of its output."""

    node: int
    output: int

    def of(self, layer: Sequence[ir.Node]) -> ir.Value:
        """The value there in a layer."""
        return layer[self.node].outputs[self.output]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Nodes by what they belong to, each list in the graph's order.

    Attributes:
        first: Nodes of the first layer behind those that lead; some of ``outside`` may stand
            between them.
        stamp: Of the second.
        last: Of the third, right behind the second.
        outside: Of no layer, or of one that leads.
        after: Those of ``outside`` that come behind the last layer.
        constants: Values that depend on no weight, and on no input but its sizes: they are the same
            wherever in a deeper stack they are made.
        number: Of the stamp.
    """

    first: list[ir.Node]
    stamp: list[ir.Node]
    last: list[ir.Node]
    outside: list[ir.Node]
    after: list[ir.Node]
    constants: frozenset[ir.Value]
    number: int


def split_trace(graph: ir.Graph, scope: str, *, num_leading: int = 0) -> Trace:
    """Sort a graph's nodes by the layer they are from.

    Args:
        graph: With the exporter's metadata.
        scope: Name of the list of layers in the traced module.
        num_leading: How many layers lead.

    Raises:
        ExportError: a layer has no nodes, or the layers do not follow each other.
    """
    nodes = list(graph)
    layers: list[list[ir.Node]] = [[] for _ in range(NUM_TRACED)]
    for node in nodes:
        scopes = node.metadata_props.get(SCOPES, "")
        for index, layer in enumerate(layers, start=num_leading):
            if f"'{scope}.{index}'" in scopes:
                layer.append(node)
    first, stamp, last = layers
    if not (first and stamp and last):
        raise unlike("no nodes are marked as a layer's", scope)
    start = nodes.index(stamp[0])
    end = start + len(stamp) + len(last)
    if nodes[start:end] != stamp + last or not set(first) <= set(nodes[:start]):
        raise unlike("layers do not follow each other", scope)
    inside = set(first)
    return Trace(
        first=first,
        stamp=stamp,
        last=last,
        outside=[n for n in nodes[:start] if n not in inside] + nodes[end:],
        after=nodes[end:],
        constants=frozenset(_constants(nodes)),
        number=num_leading + 1,
    )


def _constants(nodes: Iterable[ir.Node]) -> set[ir.Value]:
    found: set[ir.Value | None] = {None}
    for node in nodes:
        sizes = node.op_type == "Shape" and all(v and v.producer() is None for v in node.inputs)
        known = node.inputs and found.issuperset(node.inputs)
        if node.op_type == "Constant" or sizes or known:
            found.update(node.outputs)
    return {value for value in found if value is not None}


def check_outside(trace: Trace, outputs: Sequence[ir.Value], labels: Labels) -> None:
    """Refuse a trace where something beside the layers tells them apart.

    What is of no layer may read the last layer, and constants wherever they were made: a constant
    is the same in a deeper stack, while "the layer before the last" is another layer there.

    Raises:
        ExportError: it does, or is an output of an earlier layer, or a node has a subgraph.
    """
    early = set(outputs_of(trace.first + trace.stamp)) - trace.constants
    for node in trace.outside:
        for value in node.inputs:
            if value is None:
                continue
            # Lengths are read off whichever cache comes to hand; all caches have the same.
            layer = labels.layer(value)
            own = value.producer() is None and layer is not None and layer >= trace.number - 1
            if value in early or (own and node.op_type != "Shape"):
                raise unlike("a node outside the layers reads what is one layer's", node.name)
    for value in outputs:
        if value in early and labels.layer(value) is None:
            raise unlike("an output is one layer's", value.name)
    for node in chain(trace.outside, trace.first, trace.stamp, trace.last):
        if any(attribute.type in _SUBGRAPHS for attribute in node.attributes.values()):
            raise unlike("a node has a subgraph", node.name)


def align(trace: Trace, labels: Labels) -> dict[ir.Value, Place]:
    """Compare the stamp with the last layer.

    Returns:
        For each value the stamp reads from the first layer, where the stamp makes the like of it
        for the next.

    Raises:
        ExportError: the two differ in more than the layer they are.
    """
    stamp_at, last_at = _places(trace.stamp), _places(trace.last)
    first = set(outputs_of(trace.first))
    if len(trace.stamp) != len(trace.last):
        raise unlike("layers differ in length", f"{len(trace.stamp)}, then {len(trace.last)}")
    carried: dict[ir.Value, Place] = {}
    partners: dict[ir.Value, ir.Value] = {}
    for stamp, last in zip(trace.stamp, trace.last, strict=True):
        if _operation(stamp) != _operation(last):
            raise unlike("layers differ in a node", f"{stamp.name}, then {last.name}")
        for ours, theirs in zip(stamp.inputs, last.inputs, strict=True):
            if ours is None or theirs is None:
                explained = ours is theirs
            elif partners.setdefault(ours, theirs) is not theirs:
                explained = False
            elif ours in stamp_at or theirs in last_at:
                explained = stamp_at.get(ours) == last_at.get(theirs)
            elif labels.layer(ours) is not None:
                follows = theirs.name == labels.name(ours, trace.number + 1)
                explained = labels.layer(ours) == trace.number and follows
            elif ours in first and theirs in stamp_at:
                explained = True
                carried[ours] = stamp_at[theirs]
            else:
                common = ours not in first or ours in trace.constants
                explained = ours is theirs and common
            if not explained:
                raise unlike("layers read differently", f"{stamp.name}, then {last.name}")
    _check_caches(trace, labels)
    return carried


def _check_caches(trace: Trace, labels: Labels) -> None:
    """Each layer makes its own caches, all at the same places."""
    layers = (trace.first, trace.stamp, trace.last)
    for index, layer in enumerate(layers, start=trace.number - 1):
        if any(labels.layer(value) not in {None, index} for value in outputs_of(layer)):
            raise unlike("a layer makes another layer's cache", index)
    for ours, theirs in zip(outputs_of(trace.stamp), outputs_of(trace.last), strict=True):
        labelled = labels.layer(ours) is not None or labels.layer(theirs) is not None
        if labelled and labels.name(ours, trace.number + 1) != theirs.name:
            raise unlike("layers differ in a cache", f"{ours.name}, then {theirs.name}")


def _operation(node: ir.Node) -> tuple[object, ...]:
    """What a node does, apart from what it reads."""
    attributes = [
        (a.name, a.type, a.ref_attr_name, _attribute_value(a)) for a in node.attributes.values()
    ]
    results = [(value.dtype, str(value.shape)) for value in node.outputs]
    return node.domain, node.op_type, node.overload, len(node.inputs), attributes, results


def _attribute_value(attribute: ir.Attr) -> object:
    if attribute.type != ir.AttributeType.TENSOR or attribute.is_ref():
        return attribute.value
    tensor = attribute.as_tensor()
    return tensor.dtype, str(tensor.shape), tensor.tobytes()


def outputs_of(nodes: Iterable[ir.Node]) -> Iterator[ir.Value]:
    """All values that nodes make, in order."""
    return chain.from_iterable(node.outputs for node in nodes)


def _places(layer: Iterable[ir.Node]) -> Mapping[ir.Value, Place]:
    return {
        value: Place(i, j) for i, node in enumerate(layer) for j, value in enumerate(node.outputs)
    }
