"""The structure of an ONNX file: nodes, attributes, places of weights, without the onnx package.

Read with the standard library alone, see ``wire``, since a device may have nothing else, and since
the onnx package refuses the hard links by which a bundle may hold its weights. No weight in another
file is read.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from gap_export.errors import BundleError
from gap_export.graph.wire import Message, read_fields, write_field

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_FUNCTION, _FUNCTION_NODE = 7, 25, 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE = 1, 5, 11, 12, 13
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP_TYPE, _NODE_ATTRIBUTE, _NODE_DOMAIN = (
    1,
    2,
    3,
    4,
    5,
    7,
)
_ATTRIBUTE_NAME, _ATTRIBUTE_INT, _ATTRIBUTE_TENSOR, _ATTRIBUTE_INTS = 1, 3, 5, 8
_ATTRIBUTE_GRAPHS = (6, 11)
_TENSOR_DTYPE, _TENSOR_INTS, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL = 2, 7, 8, 9, 13
_VALUE_NAME, _VALUE_TYPE, _TYPE_TENSOR, _TENSOR_TYPE_DTYPE = 1, 2, 1, 1
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
# A protobuf message cannot be larger.
_MAX_BYTES = (1 << 31) - 1
# Of TensorProto.DataType.
FLOAT, INT64, FLOAT16, DOUBLE, BFLOAT16 = 1, 7, 10, 11, 16


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of a graph.

    Attributes:
        inputs: Names of values; empty for an optional input that is not given.
        attributes: Messages of the attributes, by name.
        subgraphs: Graphs among its attributes.
    """

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, memoryview]
    subgraphs: tuple[memoryview, ...]

    @classmethod
    def of(cls, raw: memoryview) -> Node:
        """Decode a node's message."""
        message = Message(raw)
        attributes = [(Message(part), part) for part in message.contents(_NODE_ATTRIBUTE)]
        return cls(
            name=message.text(_NODE_NAME),
            op_type=message.text(_NODE_OP_TYPE),
            domain=message.text(_NODE_DOMAIN),
            inputs=message.texts(_NODE_INPUT),
            outputs=message.texts(_NODE_OUTPUT),
            attributes={each.text(_ATTRIBUTE_NAME): part for each, part in attributes},
            subgraphs=tuple(g for each, _ in attributes for g in each.contents(*_ATTRIBUTE_GRAPHS)),
        )

    @cached_property
    def reads(self) -> frozenset[str]:
        """The values it reads, and those of the graph around it that its subgraphs read."""
        found = set(self.inputs)
        for raw in self.subgraphs:
            graph = Message(raw)
            read = {Message(part).text(_VALUE_NAME) for part in graph.contents(_GRAPH_OUTPUT)}
            own = {Message(part).text(_VALUE_NAME) for part in graph.contents(_GRAPH_INPUT)}
            own |= {Message(p).text(_TENSOR_NAME) for p in graph.contents(_GRAPH_INITIALIZER)}
            for inner in map(Node.of, graph.contents(_GRAPH_NODE)):
                read |= inner.reads
                own.update(inner.outputs)
            found |= read - own
        return frozenset(filter(None, found))

    def is_standard(self, *op_types: str) -> bool:
        """Whether it is one of some operators of ONNX's own domain."""
        return self.op_type in op_types and self.domain in ("", "ai.onnx")

    def integer(self, name: str, default: int = 0) -> int:
        """An attribute that is one integer."""
        if name not in self.attributes:
            return default
        return (Message(self.attributes[name]).integers(_ATTRIBUTE_INT) or [0])[-1]


@dataclass(frozen=True, kw_only=True)
class Initializer:
    """A constant of a graph.

    Attributes:
        dtype: Code of ``TensorProto.DataType``.
        location: The file its bytes lie in, relative to the graph's folder; None: the graph's own.
        size: Number of bytes; None where the file does not say.
        raw: The message in the file.
    """

    dtype: int
    location: str | None
    size: int | None
    raw: memoryview

    @classmethod
    def of(cls, raw: memoryview) -> Initializer:
        """Decode a tensor's message."""
        message, external = Message(raw), dict[str, str]()
        for part in message.contents(_TENSOR_EXTERNAL):
            entry = Message(part)
            external[entry.text(_ENTRY_KEY)] = entry.text(_ENTRY_VALUE)
        size: int | None = sum(map(len, message.contents(_TENSOR_RAW)[-1:]))
        if external:
            size = int(external["length"]) if "length" in external else None
        return cls(
            dtype=(message.integers(_TENSOR_DTYPE) or [0])[-1],
            location=external.get("location", "") if external else None,
            size=size,
            raw=raw,
        )


@dataclass(frozen=True, eq=False)
class OnnxFile:
    """An ONNX model, of which mostly the main graph is of interest.

    Attributes:
        raw: The model's bytes.
        folder: Where its weights lie.
    """

    raw: bytes
    folder: Path

    @classmethod
    def read(cls, path: Path) -> OnnxFile:
        """Read a file's structure; weights in other files are not read.

        Raises:
            BundleError: it is not an ONNX file, larger than protobuf allows, or cannot be read.
        """
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise BundleError("not an ONNX file", seen=f"{path}: {path.stat().st_size} bytes")
            file = cls(path.read_bytes(), path.parent)
            # All that is decoded later, so that what is wrong with a file is said here.
            _ = file.initializers, file.inputs, file.outputs, file.function_nodes
            _ = [node.reads for node in file.nodes]
        except (OSError, ValueError, IndexError, RecursionError) as err:
            raise BundleError("not an ONNX file, or cut short", seen=f"{path}: {err}") from err
        return file

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """Those of the main graph, in an order in which they can be run."""
        return tuple(map(Node.of, self._graph.contents(_GRAPH_NODE)))

    @cached_property
    def all_nodes(self) -> tuple[Node, ...]:
        """The same, and before each node those of the graphs within it."""
        return tuple(_flatten(self.nodes))

    @cached_property
    def function_nodes(self) -> tuple[Node, ...]:
        """Nodes of the model's local functions, whose values have names of their own."""
        functions = Message(memoryview(self.raw)).contents(_MODEL_FUNCTION)
        parts = (part for each in functions for part in Message(each).contents(_FUNCTION_NODE))
        return tuple(_flatten(map(Node.of, parts)))

    @cached_property
    def initializers(self) -> Mapping[str, Initializer]:
        """By name."""
        parts = self._graph.contents(_GRAPH_INITIALIZER)
        return {Message(part).text(_TENSOR_NAME): Initializer.of(part) for part in parts}

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of what is fed."""
        names = (Message(part).text(_VALUE_NAME) for part in self._graph.contents(_GRAPH_INPUT))
        return tuple(name for name in names if name not in self.initializers)

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of what the graph gives."""
        parts = self._graph.contents(_GRAPH_OUTPUT)
        return tuple(Message(part).text(_VALUE_NAME) for part in parts)

    @cached_property
    def producers(self) -> Mapping[str, int]:
        """For each value that the main graph computes the index of its node."""
        return {
            name: index for index, node in enumerate(self.nodes) for name in node.outputs if name
        }

    @cached_property
    def dtypes(self) -> Mapping[str, int]:
        """Codes of the values whose dtype the file states."""
        found: dict[str, int] = {}
        for part in self._graph.contents(_GRAPH_INPUT, _GRAPH_OUTPUT, _GRAPH_VALUE):
            value = Message(part)
            for kind in value.contents(_VALUE_TYPE):
                for tensor in Message(kind).contents(_TYPE_TENSOR):
                    code = Message(tensor).integers(_TENSOR_TYPE_DTYPE)
                    found.update({value.text(_VALUE_NAME): code[-1]} if code else {})
        return found | {name: tensor.dtype for name, tensor in self.initializers.items()}

    def integers(self, name: str) -> list[int] | None:
        """An int64 constant whose numbers stand in the file; None for any other value."""
        tensor = self.initializers.get(name)
        raw = None if tensor is None else tensor.raw
        if raw is None:
            index = self.producers.get(name)
            node = None if index is None else self.nodes[index]
            if node is None or not node.is_standard("Constant") or len(node.attributes) != 1:
                return None
            (attribute,) = map(Message, node.attributes.values())
            if not (tensors := attribute.contents(_ATTRIBUTE_TENSOR)):
                given = attribute.integers(_ATTRIBUTE_INT) + attribute.integers(_ATTRIBUTE_INTS)
                return given or None
            (raw,) = tensors
        message = Message(raw)
        if message.integers(_TENSOR_DTYPE) != [INT64] or message.contents(_TENSOR_EXTERNAL):
            return None
        held = message.contents(_TENSOR_RAW)
        if held and len(held[-1]) % 8 == 0:
            return [number for (number,) in struct.iter_unpack("<q", held[-1])]
        return message.integers(_TENSOR_INTS)

    def above(self, names: Iterable[str]) -> set[int]:
        """Indices of the nodes that have a part in some values."""
        found: set[int] = set()
        waiting = list(names)
        while waiting:
            index = self.producers.get(waiting.pop())
            if index is not None and index not in found:
                found.add(index)
                waiting += self.nodes[index].reads
        return found

    def extract(self, names: Collection[str]) -> bytes:
        """A model that gives these values and nothing else, of the nodes above them.

        Args:
            names: Computed values or initializers.
        """
        keep = self.above(names)
        read = set(names).union(*(self.nodes[index].reads for index in keep))
        graph, number = bytearray(), -1
        for field in self._graph.fields:
            number += field.number == _GRAPH_NODE
            if field.content is None or field.number in {_GRAPH_OUTPUT, _GRAPH_VALUE}:
                continue
            is_kept = number in keep if field.number == _GRAPH_NODE else True
            if field.number == _GRAPH_INPUT:
                is_kept = Message(field.content).text(_VALUE_NAME) in read
            elif field.number == _GRAPH_INITIALIZER:
                is_kept = Message(field.content).text(_TENSOR_NAME) in read
            graph += field.raw if is_kept else b""
        for name in names:
            graph += write_field(_GRAPH_OUTPUT, write_field(_VALUE_NAME, name.encode()))
        return self._with_graph(bytes(graph))

    def with_initializers(self, given: Mapping[str, Initializer]) -> OnnxFile:
        """The same model with some initializers as they stand in another file."""
        graph = bytearray()
        for field in self._graph.fields:
            held = None
            if field.number == _GRAPH_INITIALIZER and field.content is not None:
                held = given.get(Message(field.content).text(_TENSOR_NAME))
            graph += field.raw if held is None else write_field(_GRAPH_INITIALIZER, bytes(held.raw))
        return OnnxFile(self._with_graph(bytes(graph)), self.folder)

    @cached_property
    def _graph(self) -> Message:
        parts = Message(memoryview(self.raw)).contents(_MODEL_GRAPH)
        return Message(
            memoryview(b"".join(parts)) if len(parts) > 1 else (*parts, memoryview(b""))[0]
        )

    def _with_graph(self, graph: bytes) -> bytes:
        others = [f.raw for f in read_fields(memoryview(self.raw)) if f.number != _MODEL_GRAPH]
        return b"".join([*others, write_field(_MODEL_GRAPH, graph)])


def _flatten(nodes: Iterable[Node]) -> Iterator[Node]:
    for node in nodes:
        for graph in node.subgraphs:
            yield from _flatten(map(Node.of, Message(graph).contents(_GRAPH_NODE)))
        yield node
