"""Which weight or node of a graph is not what an export made now has in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from gap_export.graph.onnx_file import OnnxFile
from gap_export.parity.inside.fresh_graph import export_again
from gap_export.parity.inside.graph_search import CHUNK, Look, Search, distance_of, rounding_of
from gap_export.parity.inside.module_taps import Tap
from gap_export.parity.inside.reference_taps import ReferenceTaps
from gap_export.parity.inside.stored_weights import compare_weight
from gap_export.parity.inside.taps import Arrays, run_taps

# Of the fresh graph's values, the share that the bundle's graph must have by name.
_SHARED_NAMES = 0.9


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where it begins; None of a number: that of the module's tensor."""

    tensor: str
    operator: str
    node: str
    cause: str
    module: str = ""
    max_abs_diff: float | None = None
    allowed: float | None = None
    last_agreeing: str = ""


def wrong_weight(search: Search, first: Look, before: Sequence[Tap]) -> Place | None:
    """A parameter on the way to the first wrong tap that is not the reference's."""
    graph, component = search.graph, search.replayed.component
    parameters = dict(component.module.named_parameters())
    held = graph.initializers.keys() & parameters.keys()
    agreeing = [tap.value for tap in before]
    for index in sorted(graph.above([first.tap.value]) - graph.above(agreeing)):
        for name in sorted(graph.nodes[index].reads & held):
            initializer = graph.initializers[name]
            fault = compare_weight(initializer.raw, parameters[name], folder=graph.folder)
            if fault:
                node = graph.nodes[index]
                return Place(
                    tensor=node.outputs[0],
                    operator=node.op_type,
                    node=node.name,
                    module=name.rpartition(".")[0] or component.name,
                    cause=f"{name} is not the checkpoint's: {fault}",
                )
    return None


def wrong_operator(
    search: Search, first: Look, before: Sequence[Tap], truth: ReferenceTaps
) -> Place | str:
    """The first value, on the way to the first wrong tap, that an export made now has otherwise.

    Or, in words, why there is none.
    """
    graph, target = search.graph, first.tap.value
    fresh = export_again(graph, search.replayed.component.name, truth)
    if fresh is None:
        return "its weights are the checkpoint's; the model cannot be traced here to compare nodes"
    shared = fresh.producers.keys() & graph.producers.keys()
    if target not in shared or len(shared) < _SHARED_NAMES * len(fresh.producers):
        # Made by another version: names do not say what belongs together.
        return (
            "its weights are the checkpoint's; its nodes have other names than those of an export"
        )
    agreeing = [tap.value for tap in before]
    names = [
        name
        for index in sorted(fresh.above([target]) - fresh.above(agreeing))
        for name in fresh.nodes[index].outputs
        if name
    ]
    last = ""
    for start in range(0, len(names), CHUNK):
        chunk = names[start : start + CHUNK]
        known = [name for name in chunk if name in graph.producers]
        feed = search.replayed.feed
        right, seen = run_taps(fresh, known, feed), run_taps(graph, known, feed)
        for name in chunk:
            place = _changed(name, fresh, graph, right, seen)
            if place is not None:
                # A node that is missing stands where those stand that are still there.
                holder = graph if place.tensor in graph.producers else fresh
                module = _module_of(holder, place.tensor, first.tap, before)
                return replace(place, module=module, last_agreeing=last)
            if right[name].dtype.kind == "f" and right[name].ndim:
                last = name
    return (
        "its weights are the checkpoint's, and no node was found that an export made now has "
        "otherwise: the runtime may compute otherwise"
    )


def _changed(
    name: str, fresh: OnnxFile, graph: OnnxFile, right: Arrays, seen: Arrays
) -> Place | None:
    """What there is to say of a value that is not what a fresh export has."""
    wanted = fresh.nodes[fresh.producers[name]]
    if name not in seen:
        return Place(
            tensor=name,
            operator=wanted.op_type,
            node=wanted.name,
            cause=f"the graph lacks this {wanted.op_type}, which an export has",
        )
    distance, allowed = distance_of(right[name], seen[name]), rounding_of(right[name])
    if distance <= allowed:
        return None
    node = graph.nodes[graph.producers[name]]
    added = [
        index
        for index in graph.above([name])
        if not fresh.producers.keys() & set(graph.nodes[index].outputs)
    ]
    if added:
        node = graph.nodes[min(added)]
        cause = f"the graph has this {node.op_type} before {name}, and an export has not"
    elif node.op_type != wanted.op_type:
        cause = f"this is a {node.op_type}, where an export has a {wanted.op_type}"
    elif node.inputs != wanted.inputs:
        cause = f"it reads {', '.join(node.inputs)}; of an export {', '.join(wanted.inputs)}"
    else:
        cause = f"this {node.op_type} does not compute what that of an export does"
    return Place(
        tensor=node.outputs[0],
        operator=node.op_type,
        node=node.name,
        cause=cause,
        max_abs_diff=distance,
        allowed=allowed,
    )


def _module_of(graph: OnnxFile, value: str, wrong: Tap, before: Sequence[Tap]) -> str:
    """The innermost module that holds both what comes before a value and what comes behind."""
    known = {name for index in graph.above([value]) for name in graph.nodes[index].outputs}
    above = [tap.module for tap in before if tap.side is not None and tap.value in known]
    if not above:
        return ""
    nearest = above[-1].split(".")[:-1]
    if wrong.side is None:
        return ".".join(nearest)
    pairs = zip(nearest, wrong.module.split("."), strict=False)
    return ".".join(mine for mine, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
