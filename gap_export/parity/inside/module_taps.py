"""Where in a graph the modules of a model read and give what they do, by the weights they read."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from gap_export.graph.onnx_file import Node, OnnxFile
from gap_export.parity.inside.reference_taps import Side

_WEIGHT, _BIAS, _PACKED = "weight", "bias", ".int4"
# What hands a weight on, in another dtype, shape or order.
_PREPARES = frozenset({"Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose"})
# Operators whose first input is what the module was given; an RMS norm ends in a Mul.
_TAKES_FIRST = frozenset({"Conv", "Gemm", "LayerNormalization", "MatMul", "RMSNormalization"})
_GIVES = _TAKES_FIRST | {"Gather", "Mul"}


@dataclass(frozen=True, kw_only=True)
class Tap:
    """A value of a graph that the reference has as well.

    Attributes:
        value: Name in the graph.
        module: Whose it is, dotted; of an output of the graph its name.
        side: What the module was given, or what it gave; None of an output of the graph.
        turn: How often the module was run before.
    """

    value: str
    module: str
    side: Side | None
    turn: int = 0


def find_taps(graph: OnnxFile, outputs: Collection[str]) -> tuple[Tap, ...]:
    """The taps of a graph, in an order in which they are computed; each value once.

    Args:
        graph: A base graph: initializers have the names of the modules' parameters.
        outputs: Those that are compared.
    """
    found: dict[str, Tap] = {}
    for tap in _module_taps(graph):
        known = found.get(tap.value)
        # What one module gives is what the next is given: the giver is the one to name.
        if known is None or (known.side == "input" and tap.side == "output"):
            found[tap.value] = tap
    for name in outputs:
        found.setdefault(name, Tap(value=name, module=name, side=None))
    order = {name: index for name, index in graph.producers.items() if name in found}
    return tuple(sorted(found.values(), key=lambda tap: order.get(tap.value, -1)))


def _module_taps(graph: OnnxFile) -> Iterator[Tap]:
    owners = {
        name: name.removesuffix(_PACKED).removesuffix(_WEIGHT).removesuffix(".")
        for name in graph.initializers
        if name.removesuffix(_PACKED).rpartition(".")[2] == _WEIGHT
    }
    turns: dict[str, int] = {}
    for node in graph.nodes:
        if node.op_type in _PREPARES and node.inputs and node.inputs[0] in owners:
            owners[node.outputs[0]] = owners[node.inputs[0]]
            continue
        module = next((owners[name] for name in node.inputs if name in owners), None)
        if module is None or node.op_type not in _GIVES:
            continue
        turn = turns[module] = turns.get(module, -1) + 1
        if node.op_type in _TAKES_FIRST and node.inputs[0] not in owners:
            yield Tap(value=node.inputs[0], module=module, side="input", turn=turn)
        value = _behind_bias(graph, node, f"{module}.{_BIAS}")
        yield Tap(value=value, module=module, side="output", turn=turn)


def _behind_bias(graph: OnnxFile, node: Node, bias: str) -> str:
    """What a module gives, where its bias, or room for taps behind a word, is a node of its own."""
    value = result = node.outputs[0]
    for follower in graph.nodes[graph.producers[value] + 1 :]:
        if value in follower.inputs:
            if follower.op_type == "Pad" or (follower.op_type == "Add" and bias in follower.inputs):
                return follower.outputs[0]
            if follower.op_type != "Reshape":
                break
            value = follower.outputs[0]
    return result
