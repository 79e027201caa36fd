"""Where the weights of an ONNX file lie, and its nodes, without the onnx package.

Reads protobuf's wire format (https://protobuf.dev/programming-guides/encoding/) as far as
ModelProto -> GraphProto -> NodeProto and TensorProto go; types, attributes and all else are
skipped over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gap_export.errors import BundleError

T = TypeVar("T")

# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_FUNCTION = 7, 25
_FUNCTION_NODE = 7
_GRAPH_NODE, _GRAPH_INITIALIZER = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP_TYPE, _NODE_DOMAIN = 1, 2, 3, 4, 7
_TENSOR_NAME, _TENSOR_RAW_DATA, _TENSOR_EXTERNAL = 8, 9, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
# Wire types.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# A protobuf message cannot be larger.
_MAX_BYTES = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class Initializer:
    """A constant of a graph.

    Attributes:
        name: In the graph.
        location: The file its bytes lie in, relative to the graph's folder; None: the graph's own.
        size: In bytes; None where the file does not say.
    """

    name: str
    location: str | None
    size: int | None


@dataclass(frozen=True, kw_only=True)
class GraphNode:
    """One node of a graph; an empty input name is an optional input that is not given."""

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MessageField:
    """One field of a protobuf message.

    Attributes:
        number: Of the field.
        content: Without key and length; None of a field that has no length.
        raw: All of its bytes.
    """

    number: int
    content: memoryview | None
    raw: memoryview


def read_initializers(path: Path) -> tuple[Initializer, ...]:
    """The constants of a model's main graph.

    Raises:
        BundleError: not an ONNX file, cut short, or larger than protobuf allows.
        OSError: the file cannot be read.
    """
    return tuple(_read(path, {_MODEL_GRAPH: _GRAPH_INITIALIZER}, _initializer))


def read_nodes(path: Path) -> list[GraphNode]:
    """The nodes of a model's main graph, in order.

    Raises:
        BundleError: not an ONNX file, cut short, or larger than protobuf allows.
        OSError: the file cannot be read.
    """
    return _read(path, {_MODEL_GRAPH: _GRAPH_NODE}, parse_node)


def read_operators(path: Path) -> dict[str, str]:
    """The operator of each named node of a model's main graph and of its functions.

    Raises:
        BundleError: not an ONNX file, cut short, or larger than protobuf allows.
        OSError: the file cannot be read.
    """
    places = {_MODEL_GRAPH: _GRAPH_NODE, _MODEL_FUNCTION: _FUNCTION_NODE}
    return {node.name: node.op_type for node in _read(path, places, parse_node)}


def _read(path: Path, places: Mapping[int, int], read: Callable[[memoryview], T]) -> list[T]:
    """What some fields of the model's parts hold: by the part's field number, one of its own."""
    if path.stat().st_size > _MAX_BYTES:
        raise BundleError("not an ONNX file", seen=f"{path}: {path.stat().st_size} bytes")
    raw = memoryview(path.read_bytes())
    try:
        return [
            read(content)
            for number, part in _fields(raw)
            if number in places
            for inner, content in _fields(part)
            if inner == places[number]
        ]
    except (ValueError, IndexError) as err:
        raise BundleError("not an ONNX file, or cut short", seen=f"{path}: {err}") from err


def parse_node(raw: memoryview) -> GraphNode:
    """A node from its message.

    Raises:
        ValueError: not a message, or cut short.
        IndexError: cut short.
    """
    texts: dict[int, list[str]] = {}
    for number, value in _fields(raw):
        if number in {_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP_TYPE, _NODE_DOMAIN}:
            texts.setdefault(number, []).append(bytes(value).decode())
    # Of a field that should stand once and stands twice, protobuf takes the last.
    name, op_type, domain = (
        texts.get(number, [""])[-1] for number in (_NODE_NAME, _NODE_OP_TYPE, _NODE_DOMAIN)
    )
    return GraphNode(
        name=name,
        op_type=op_type,
        domain=domain,
        inputs=tuple(texts.get(_NODE_INPUT, [])),
        outputs=tuple(texts.get(_NODE_OUTPUT, [])),
    )


def _initializer(raw: memoryview) -> Initializer:
    name, size, external = "", 0, {}
    for number, value in _fields(raw):
        if number == _TENSOR_NAME:
            name = bytes(value).decode()
        elif number == _TENSOR_EXTERNAL:
            entry = {inner: bytes(text).decode() for inner, text in _fields(value)}
            external[entry.get(_ENTRY_KEY, "")] = entry.get(_ENTRY_VALUE, "")
        elif number == _TENSOR_RAW_DATA:
            size = len(value)
    if not external:
        return Initializer(name=name, location=None, size=size)
    length = external.get("length")
    return Initializer(
        name=name,
        location=external.get("location", ""),
        size=None if length is None else int(length),
    )


def _fields(raw: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Field numbers and contents of the length-delimited fields of a message; skips the others."""
    for field in message_fields(raw):
        if field.content is not None:
            yield field.number, field.content


def message_fields(raw: memoryview) -> Iterator[MessageField]:
    """The fields of a protobuf message, in order.

    Raises:
        ValueError: not a message, or cut short.
        IndexError: cut short.
    """
    at = 0
    while at < len(raw):
        start = at
        key, at = _varint(raw, at)
        number, wire_type = key >> 3, key & 7
        content: memoryview | None = None
        if wire_type == _VARINT:
            _, at = _varint(raw, at)
        elif wire_type in {_FIXED64, _FIXED32}:
            at += 8 if wire_type == _FIXED64 else 4
        elif wire_type == _BYTES:
            size, at = _varint(raw, at)
            if at + size > len(raw):
                raise ValueError(f"a field of {size} bytes at {at} of {len(raw)}")
            content = raw[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire_type} at {at}")
        if at > len(raw):
            break
        yield MessageField(number=number, content=content, raw=raw[start:at])
    if at != len(raw):
        raise ValueError(f"ends at {at} of {len(raw)}")


def _varint(raw: memoryview, at: int) -> tuple[int, int]:
    """A base-128 number, least significant group first, and where the next byte is."""
    value = 0
    for shift in range(0, 70, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number longer than 10 bytes at {at}")
