"""Makes the rotary maths on queries and keys RotaryEmbedding nodes (opset 23) with a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from numpy.typing import NDArray

from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.matching import (
    add_initializer,
    constant,
    is_operator,
    like,
    other_input,
    require_constant,
    require_producer,
    require_reader,
    static_dim,
    take_place,
)

COS_TABLE, SIN_TABLE = "rotary.cos", "rotary.sin"
_HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


class FuseRotary(GraphPass):
    """Rewrites ``x * cos + turned(x) * sin`` to ``RotaryEmbedding(x, cos, sin, position_ids)``.

    The tables [positions, d / 2] are worked out here as the graph does it, in float32 from whole
    numbers, and cast then: an id above 2048, which float16 cannot hold, is still exact. The node
    reads the ids that the graph's cos and sin came from, whatever made them (GapRemap). An id
    beyond the table is out of the node's range: whoever feeds the graph keeps below it.

    What marks the maths is a Cos; whoever reads it must be such a rotation, or none is rewritten.
    Does not handle: interleaved pairs, rotations of a part of a head, frequencies that depend on
    the input or are weights, several position axes (M-RoPE), graphs in float32.

    Args:
        max_position_embeddings: Rows of the tables: ids are below it.
    """

    name: ClassVar[str] = "FuseRotary"

    def __init__(self, *, max_position_embeddings: int) -> None:
        if max_position_embeddings < 1:
            raise PassError(
                "a table of cos and sin has a row for each position",
                seen=max_position_embeddings,
                allowed="1 or more",
            )
        self._rows = max_position_embeddings

    def apply(self, model: ir.Model) -> bool:
        """Rewrite; True if there was rotary maths.

        Raises:
            PassError: a Cos, or what reads it, is not part of what the pass handles.
        """
        marks = [node for node in model.graph if is_operator(node, "Cos")]
        if len(marks) > 1:
            names = ", ".join(str(node.name) for node in marks)
            raise PassError("rotary maths starts in several places", seen=names, allowed="one Cos")
        for mark in marks:
            angles = _match_angles(mark)
            readers = _readers(angles.cos)
            for reader in readers:
                _match_rotation(reader, angles)
            if len(readers) != len(_readers(angles.sin)):
                raise PassError("not all who read the sine read the cosine", seen=angles.sin.name)
            self._rewrite(model.graph, angles, readers)
            common_passes.RemoveUnusedNodesPass()(model)
        return bool(marks)

    def _rewrite(self, graph: ir.Graph, angles: _Angles, readers: list[ir.Node]) -> None:
        turns = np.arange(self._rows, dtype=np.float32)[:, None] * angles.frequencies[None, :]
        dtype = angles.dtype.numpy()
        cos = add_initializer(graph, COS_TABLE, np.cos(turns).astype(dtype))
        sin = add_initializer(graph, SIN_TABLE, np.sin(turns).astype(dtype))
        for reader in readers:
            # Once more: what one reads may be what another has given and gives no longer.
            rotation = _match_rotation(reader, angles)
            node = ir.Node(
                "",
                "RotaryEmbedding",
                [rotation.x, cos, sin, angles.ids],
                [ir.AttrInt64("interleaved", 0)],
                outputs=[like(rotation.last.outputs[0])],
                name=rotation.last.name,
            )
            take_place(graph, rotation.last, node)


@dataclass(frozen=True, kw_only=True)
class _Angles:
    """``cos`` and ``sin`` [B, 1, S, d] of 16-bit floats, ``ids`` int64 [B, S]."""

    ids: ir.Value
    frequencies: NDArray[Any]
    cos: ir.Value
    sin: ir.Value
    dtype: ir.DataType


@dataclass(frozen=True, kw_only=True)
class _Rotation:
    x: ir.Value
    last: ir.Node


def _readers(value: ir.Value) -> list[ir.Node]:
    return [node for node, _ in value.uses()]


def _match_angles(mark: ir.Node) -> _Angles:
    where = f"rotary maths at {mark.name}"
    both = require_producer(mark.inputs[0], "Concat", part=f"{where}: both halves of the angles")
    half = both.inputs[0]
    axis = both.attributes["axis"].as_int()
    if len(both.inputs) != 2 or both.inputs[1] is not half or axis not in {-1, 3}:
        raise PassError(f"{where}: its halves differ", seen=f"{list(both.inputs)}, axis {axis}")
    product = require_producer(half, "Mul", part=f"{where}: the angles")
    ids_side = product.inputs[0]
    if constant(ids_side) is not None:
        ids_side = product.inputs[1]
    frequencies = require_constant(other_input(product, ids_side), part=f"{where}: frequencies")
    if frequencies.ndim != 1 or frequencies.dtype != np.float32:
        raise PassError(
            f"{where}: its frequencies are not a row of float32",
            seen=f"{frequencies.dtype} {list(frequencies.shape)}",
        )
    sines = [node for node in _readers(both.outputs[0]) if is_operator(node, "Sin")]
    if len(sines) != 1:
        raise PassError(f"{where}: no one Sin of the same angles", seen=len(sines))
    cos, sin = (
        require_reader(node.outputs[0], "Cast", part=where).outputs[0] for node in (mark, *sines)
    )
    if cos.dtype not in _HALF or sin.dtype != cos.dtype:
        raise PassError(f"{where}: not cast to 16-bit floats", seen=f"{cos.dtype}, {sin.dtype}")
    assert cos.dtype is not None
    ids = _match_ids(ids_side, where)
    return _Angles(ids=ids, frequencies=frequencies, cos=cos, sin=sin, dtype=cos.dtype)


def _match_ids(value: ir.Value | None, where: str) -> ir.Value:
    """The int64 [B, S] behind float32 [B, 1, S, 1]."""
    part = f"{where}: position ids as a column"
    outer = require_producer(value, "Unsqueeze", part=part)
    inner = require_producer(outer.inputs[0], "Unsqueeze", part=part)
    cast = require_producer(inner.inputs[0], "Cast", part=part)
    ids = cast.inputs[0]
    axes = [require_constant(node.inputs[1], part=part).tolist() for node in (inner, outer)]
    assert ids is not None
    rank = None if ids.shape is None else ids.shape.rank()
    seen = (ids.dtype, rank, cast.outputs[0].dtype, axes)
    if seen != (ir.DataType.INT64, 2, ir.DataType.FLOAT, [[1], [3]]):
        raise PassError(
            part,
            seen=f"{ids.name}, {ids.dtype} of {rank} axes, axes added {axes}",
            allowed="INT64 [batch, sequence] in float32, axes 1 and 3 added",
        )
    return ids


def _match_rotation(by_cos: ir.Node, angles: _Angles) -> _Rotation:
    where = f"rotation at {by_cos.name}"
    if not is_operator(by_cos, "Mul"):
        raise PassError(f"{where}: the cosine is read by another operator", seen=by_cos.op_type)
    x = other_input(by_cos, angles.cos)
    last = require_reader(by_cos.outputs[0], "Add", part=where)
    by_sin = require_producer(
        other_input(last, by_cos.outputs[0]), "Mul", part=f"{where}: the part by the sine"
    )
    if angles.sin not in by_sin.inputs:
        raise PassError(f"{where}: the other part is not by the sine", seen=by_sin.name)
    turned = require_producer(
        other_input(by_sin, angles.sin), "Concat", part=f"{where}: its turned halves"
    )
    assert x is not None
    width, half = static_dim(x, 3), len(angles.frequencies)
    if width != 2 * half or turned.attributes["axis"].as_int() not in {-1, 3}:
        raise PassError(f"{where}: head width", seen=width, allowed=str(2 * half))
    if len(turned.inputs) != 2:
        raise PassError(f"{where}: turned parts", seen=len(turned.inputs), allowed="2")
    negative = require_producer(turned.inputs[0], "Neg", part=f"{where}: the second half")
    _check_slice(negative.inputs[0], x, (half, 2 * half), where)
    _check_slice(turned.inputs[1], x, (0, half), where)
    return _Rotation(x=x, last=last)


def _check_slice(value: ir.Value | None, x: ir.Value, wanted: tuple[int, int], where: str) -> None:
    part = require_producer(value, "Slice", part=f"{where}: a half of it")
    numbers = [require_constant(given, part=where).tolist() for given in part.inputs[1:]]
    starts, ends, axes, *steps = numbers
    # torch writes "to the end" as the largest integer.
    seen = (starts[0], min(ends[0], wanted[1]) if starts[0] else ends[0])
    on_last = axes in ([3], [-1]) and steps in ([], [[1]])
    if part.inputs[0] is not x or seen != wanted or not on_last:
        raise PassError(f"{where}: a half of it", seen=numbers, allowed=f"{wanted} of axis 3")
