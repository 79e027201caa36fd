"""The nodes of an ONNX file, without the onnx package: what ``inspect`` needs on a device.

Reads protobuf's wire format (https://protobuf.dev/programming-guides/encoding/) as far as ONNX's
ModelProto -> GraphProto -> NodeProto goes; tensors, types and attributes are skipped over.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gap_export.errors import BundleError

# Field numbers of onnx.proto.
_MODEL_GRAPH = 7
_GRAPH_NODE = 1
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP_TYPE, _NODE_DOMAIN = 1, 2, 3, 4, 7
# Wire types.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

# A protobuf message cannot be larger.
_MAX_BYTES = (1 << 31) - 1


@dataclass(frozen=True, kw_only=True)
class GraphNode:
    """One node of a graph; an empty input name is an optional input that is not given."""

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_nodes(path: Path) -> list[GraphNode]:
    """The nodes of a model's main graph, in order.

    Raises:
        BundleError: not an ONNX file, cut short, or larger than protobuf allows.
    """
    if path.stat().st_size > _MAX_BYTES:
        raise BundleError("not an ONNX file", seen=f"{path}: {path.stat().st_size} bytes")
    raw = memoryview(path.read_bytes())
    try:
        return [
            _node(node)
            for number, graph in _fields(raw)
            if number == _MODEL_GRAPH
            for inner, node in _fields(graph)
            if inner == _GRAPH_NODE
        ]
    except (ValueError, IndexError) as err:
        raise BundleError("not an ONNX file, or cut short", seen=f"{path}: {err}") from err


def _node(raw: memoryview) -> GraphNode:
    texts: dict[int, list[str]] = {}
    for number, value in _fields(raw):
        if number in {_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_OP_TYPE, _NODE_DOMAIN}:
            texts.setdefault(number, []).append(bytes(value).decode())
    return GraphNode(
        name="".join(texts.get(_NODE_NAME, [])),
        op_type="".join(texts.get(_NODE_OP_TYPE, [])),
        domain="".join(texts.get(_NODE_DOMAIN, [])),
        inputs=tuple(texts.get(_NODE_INPUT, [])),
        outputs=tuple(texts.get(_NODE_OUTPUT, [])),
    )


def _fields(raw: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Field numbers and contents of the length-delimited fields of a message; skips the others."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            _, at = _varint(raw, at)
        elif wire_type in {_FIXED64, _FIXED32}:
            at += 8 if wire_type == _FIXED64 else 4
        elif wire_type == _BYTES:
            size, at = _varint(raw, at)
            if at + size > len(raw):
                raise ValueError(f"a field of {size} bytes at {at} of {len(raw)}")
            yield number, raw[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire_type} at {at}")
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
