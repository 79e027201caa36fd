"""Looks inside a graph of a bundle: chosen values as outputs, computed by ONNX Runtime.

Only what lies above the chosen values is kept, so that a look at a decoder's position ids costs
nothing, however large the decoder. Weights stay where they are: ONNX Runtime reads them from the
bundle's folder, and nothing is written there. Works on the file's bytes, without the onnx package,
whose readers refuse hard links and which a device has not got.

Graph optimisations are off: a value that was fused with others does not exist any more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.engines.onnx_file import GraphNode, MessageField, message_fields, parse_node
from gap_export.errors import BundleError, GapExportError
from gap_export.runtime.backends.onnxruntime_backend import ORT_ERRORS
from gap_export.runtime.backends.onnxruntime_options import session_options, spare_memory
from gap_export.runtime.backends.quiet_onnxruntime import ort

Arrays = Mapping[str, NDArray[Any]]

# Field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE = 1, 5, 11, 12, 13
_VALUE_NAME, _TENSOR_NAME = 1, 8
_NODE_ATTRIBUTE = 5
_ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS = 6, 11
_LENGTH_DELIMITED = 2
# Where ONNX Runtime looks for weights of a model that it is given as bytes.
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
_CPU = ["CPUExecutionProvider"]
_DTYPES: Mapping[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
}


@dataclass(frozen=True, eq=False)
class Graph:
    """An ONNX model's main graph.

    Attributes:
        raw: The model's bytes.
        folder: Where its weights lie.
    """

    raw: bytes
    folder: Path

    @classmethod
    def read(cls, path: Path) -> Graph:
        """Read a file's structure; weights in other files are not read.

        Raises:
            BundleError: it is not an ONNX file, or cannot be read.
        """
        try:
            graph = cls(path.read_bytes(), path.parent)
            # All that is decoded later, so that what is wrong with a file is said here.
            _ = graph.reads, graph.initializers, graph.inputs, graph.outputs
        except (OSError, ValueError, IndexError, RecursionError) as err:
            raise BundleError("not an ONNX file, or cut short", seen=f"{path}: {err}") from err
        return graph

    @cached_property
    def nodes(self) -> tuple[GraphNode, ...]:
        """In the order of the file, which is one in which they can be run."""
        return tuple(parse_node(content) for content in self._parts(_GRAPH_NODE))

    @cached_property
    def reads(self) -> tuple[frozenset[str], ...]:
        """For each node the values it reads, those that its subgraphs read included."""
        parts = self._parts(_GRAPH_NODE)
        return tuple(
            frozenset(filter(None, (*node.inputs, *_captured(part))))
            for node, part in zip(self.nodes, parts, strict=True)
        )

    @cached_property
    def initializers(self) -> Mapping[str, memoryview]:
        """By name, each as it stands in the file."""
        return {_text(part, _TENSOR_NAME): part for part in self._parts(_GRAPH_INITIALIZER)}

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of what is fed."""
        known = self.initializers
        names = (_text(part, _VALUE_NAME) for part in self._parts(_GRAPH_INPUT))
        return tuple(name for name in names if name not in known)

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of what it gives."""
        return tuple(_text(part, _VALUE_NAME) for part in self._parts(_GRAPH_OUTPUT))

    @cached_property
    def producers(self) -> Mapping[str, int]:
        """For each computed value the index of its node."""
        return {
            name: index for index, node in enumerate(self.nodes) for name in node.outputs if name
        }

    def above(self, names: Iterable[str]) -> set[int]:
        """Indices of the nodes that have a part in some values."""
        found: set[int] = set()
        waiting = list(names)
        while waiting:
            index = self.producers.get(waiting.pop())
            if index is not None and index not in found:
                found.add(index)
                waiting += self.reads[index]
        return found

    def extract(self, names: Collection[str]) -> bytes:
        """A model that gives these values and nothing else, of the nodes above them.

        Args:
            names: Computed values or initializers.
        """
        keep = self.above(names)
        read = set(names).union(*(self.reads[index] for index in keep))
        graph = bytearray()
        number = -1
        for field in self._graph_fields():
            number += field.number == _GRAPH_NODE
            if _is_kept(field, read, is_above=number in keep):
                graph += field.raw
        for name in names:
            graph += _message(_GRAPH_OUTPUT, _message(_VALUE_NAME, name.encode()))
        return self._with_graph(bytes(graph))

    def with_initializers(self, given: Mapping[str, memoryview]) -> Graph:
        """The same graph with some of its initializers, by name, as they stand in another file."""
        graph = bytearray()
        for field in self._graph_fields():
            held = None
            if field.number == _GRAPH_INITIALIZER and field.content is not None:
                held = given.get(_text(field.content, _TENSOR_NAME))
            graph += field.raw if held is None else _message(_GRAPH_INITIALIZER, bytes(held))
        return Graph(self._with_graph(bytes(graph)), self.folder)

    def _with_graph(self, graph: bytes) -> bytes:
        model = bytearray()
        for field in message_fields(memoryview(self.raw)):
            if field.number != _MODEL_GRAPH:
                model += field.raw
        return bytes(model + _message(_MODEL_GRAPH, graph))

    def _graph_fields(self) -> Iterator[MessageField]:
        for part in message_fields(memoryview(self.raw)):
            if part.number == _MODEL_GRAPH and part.content is not None:
                yield from message_fields(part.content)

    def _parts(self, number: int) -> list[memoryview]:
        return [
            field.content
            for field in self._graph_fields()
            if field.number == number and field.content is not None
        ]


def run_taps(graph: Graph, names: Sequence[str], feed: Arrays) -> dict[str, NDArray[Any]]:
    """Compute some values of a graph.

    Args:
        graph: Of a bundle.
        names: Inputs, computed values or initializers.
        feed: All of the graph's inputs; those that have no part in the values are not looked at.

    Returns:
        By name, in the dtypes the graph has them in.

    Raises:
        GapExportError: ONNX Runtime cannot run the part of the graph that is needed.
    """
    wanted = [name for name in dict.fromkeys(names) if name not in graph.inputs]
    found = {name: feed[name] for name in names if name in graph.inputs}
    if not wanted:
        return found
    options = session_options(None)
    # Weights are mapped, and cast one at a time.
    spare_memory(options)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry(_WEIGHTS_FOLDER, str(graph.folder))
    try:
        session = ort.InferenceSession(
            graph.extract(wanted), options, providers=_CPU, enable_fallback=False
        )
        given = {
            value.name: feed[value.name].astype(_DTYPES[value.type], copy=False)
            for value in session.get_inputs()
        }
        values = session.run(wanted, given)
    except ORT_ERRORS as err:
        raise GapExportError(
            f"ONNX Runtime {ort.__version__} cannot compute what is inside a graph",
            seen=f"{wanted[0]}: {(str(err).splitlines() or [type(err).__name__])[0]}",
        ) from err
    return found | dict(zip(wanted, values, strict=True))


def _is_kept(field: MessageField, read: set[str], *, is_above: bool) -> bool:
    if field.content is None or field.number in {_GRAPH_OUTPUT, _GRAPH_VALUE}:
        return False
    if field.number == _GRAPH_NODE:
        return is_above
    if field.number == _GRAPH_INPUT:
        return _text(field.content, _VALUE_NAME) in read
    if field.number == _GRAPH_INITIALIZER:
        return _text(field.content, _TENSOR_NAME) in read
    return True


def _captured(node: memoryview) -> set[str]:
    """Values of the graph that a node's subgraphs read by name."""
    found: set[str] = set()
    for attribute in _contents(node, _NODE_ATTRIBUTE):
        for graph in (
            *_contents(attribute, _ATTRIBUTE_GRAPH),
            *_contents(attribute, _ATTRIBUTE_GRAPHS),
        ):
            read: set[str] = {_text(part, _VALUE_NAME) for part in _contents(graph, _GRAPH_OUTPUT)}
            own = {_text(part, _TENSOR_NAME) for part in _contents(graph, _GRAPH_INITIALIZER)}
            own |= {_text(part, _VALUE_NAME) for part in _contents(graph, _GRAPH_INPUT)}
            for part in _contents(graph, _GRAPH_NODE):
                inner = parse_node(part)
                read |= {*inner.inputs, *_captured(part)}
                own.update(inner.outputs)
            found |= read - own
    return found


def _contents(message: memoryview, number: int) -> list[memoryview]:
    return [
        field.content
        for field in message_fields(message)
        if field.number == number and field.content is not None
    ]


def _text(message: memoryview, number: int) -> str:
    found = _contents(message, number)
    return bytes(found[-1]).decode() if found else ""


def _message(number: int, content: bytes) -> bytes:
    """A field of some length, as protobuf writes it."""
    return _varint(number << 3 | _LENGTH_DELIMITED) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    groups = bytearray()
    while number > 0x7F:
        groups.append(number & 0x7F | 0x80)
        number >>= 7
    groups.append(number)
    return bytes(groups)
