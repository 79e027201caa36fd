"""Decoders whose cache is not what its names say; prefill is as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

Fault = Callable[[onnx.GraphProto], None]
KEY, VALUE = "present.0.key", "present.0.value"


def rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Give values other names, where nodes give and read them."""
    for node in graph.node:
        for ends in (node.input, node.output):
            ends[:] = [names.get(name, name) for name in ends]


def _swap(*pairs: tuple[str, str]) -> Fault:
    def fault(graph: onnx.GraphProto) -> None:
        rename(graph, dict([*pairs, *((other, one) for one, other in pairs)]))

    return fault


def _other_layer(graph: onnx.GraphProto) -> None:
    rename(graph, {"present.1.key": "own_key"})
    graph.node.append(helper.make_node("Identity", [KEY], ["present.1.key"]))


def _heads_turned(graph: onnx.GraphProto) -> None:
    rename(graph, {KEY: "own_key"})
    graph.initializer.append(numpy_helper.from_array(np.array([1, 0]), "turned"))
    graph.node.append(helper.make_node("Gather", ["own_key", "turned"], [KEY], axis=1))


def _values_appended(graph: onnx.GraphProto) -> None:
    """The past is that of the keys, and what is new that of the values."""
    joins = {node.output[0]: node for node in graph.node if node.op_type == "Concat"}
    past, new = joins[KEY].input[0], joins[VALUE].input[1]
    rename(graph, {KEY: "own_key"})
    graph.node.append(helper.make_node("Concat", [past, new], [KEY], axis=2))


# Those that the graph itself shows, with what is said of them, and those that only a run shows.
SEEN: Mapping[str, tuple[Fault, str]] = {
    "keys and values swapped": (_swap((KEY, VALUE)), "present.0.key grows past_key_values.0.value"),
    "values of two layers swapped": (
        _swap((VALUE, "present.1.value")),
        "present.0.value grows past_key_values.1.value",
    ),
    "another layer's": (_other_layer, "present.1.key grows past_key_values.0.key"),
}
UNSEEN: Mapping[str, Fault] = {
    "heads turned": _heads_turned,
    "values appended": _values_appended,
}
FAULTS: Mapping[str, Fault] = {**{name: fault for name, (fault, _) in SEEN.items()}, **UNSEEN}


def break_cache(path: Path, fault: str | Fault) -> None:
    """Put a fault into a decoder's file."""
    model = onnx.load(path, load_external_data=False)
    (FAULTS[fault] if isinstance(fault, str) else fault)(model.graph)
    onnx.save(model, path)


def swapped_throughout(graph: onnx.GraphProto) -> None:
    """Past and grown alike: computed rightly, under the names of others."""
    _swap((KEY, VALUE), ("past_key_values.0.key", "past_key_values.0.value"))(graph)
