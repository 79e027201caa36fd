"""Finds where a decoder's graph turns position ids into angles, by what its nodes do.

Three forms: a Cos or Sin of the product of ids and frequencies; rows taken by id from a table of
cosines or sines; a RotaryEmbedding that takes ids and does so itself. No name is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gap_export.engines.onnx_file import GraphNode
from gap_export.parity.inside.taps import Graph

Ids = NDArray[np.float64]

_STANDARD = ("", "ai.onnx")
_TRIGONOMETRY = frozenset({"Cos", "Sin"})
_PRODUCTS = frozenset({"Mul", "MatMul", "Einsum"})
# What hands its first input on as it is, or rounded, or in another shape.
_PASS_FIRST = frozenset({
    "Cast", "CastLike", "Expand", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Tile",
    "Transpose", "Unsqueeze",
})  # fmt: skip
_PASS_ALL = frozenset({"Concat"})
_SIZES = frozenset({"Shape", "Size"})
_ROTARY = "RotaryEmbedding"
# Inputs of RotaryEmbedding by domain: ids, cosines, sines.
_ROTARY_INPUTS: Mapping[str, tuple[int, int, int]] = {
    "": (3, 1, 2),
    "ai.onnx": (3, 1, 2),
    "com.microsoft": (1, 2, 3),
}
# A row's own angle is told from its neighbours' where it is this near to a whole number of turns.
_NEAR = 0.25

# What a value depends on: nothing that is fed; sizes of what is fed; what is fed.
_Depends = Literal[0, 1, 2]


@dataclass(frozen=True, kw_only=True)
class IdReader:
    """One place that turns ids into angles.

    Attributes:
        name: Operator and node, for messages.
        ids_name: The value that holds the ids, [B, S] in whatever shape; empty if it was not found.
        choice: With several position axes, where each frequency has taken the ids of one: the
            constant [F] that says which; else empty.
        tables: Values that hold cosines and sines, a row an id; empty where angles are computed.
    """

    name: str
    ids_name: str
    choice: str = ""
    tables: tuple[str, str] | tuple[()] = ()

    @property
    def values(self) -> tuple[str, ...]:
        """All that :meth:`ids` has to be given."""
        return tuple(filter(None, (self.ids_name, self.choice, *self.tables)))

    def ids(self, values: Mapping[str, NDArray[Any]], shape: tuple[int, ...]) -> Ids | str:
        """Which ids it sees, of that shape; or, in words, why there is no telling.

        Args:
            values: Those of :attr:`values`.
            shape: (B, S), or (A, B, S) where positions have several axes.
        """
        if not self.ids_name:
            return f"{self.name} does not read a product of ids and frequencies"
        found = values[self.ids_name].astype(np.float64)
        if found.size == shape[-1]:
            # Of a row that all rows share.
            found = np.broadcast_to(found.reshape(1, shape[-1]), shape)
        if len(shape) == 3 and self.choice and found.size != np.prod(shape):
            found = _by_axis(found, values[self.choice].ravel(), shape)
        if found.size != np.prod(shape):
            return f"{self.name} reads {list(found.shape)} ids instead of {list(shape)}"
        ids: Ids = found.reshape(shape)
        if not self.tables:
            return ids
        cos, sin = (values[name] for name in self.tables)
        stands_for = _ids_of_rows(cos, sin)
        rows = ids.astype(np.int64)
        if rows.min() < 0 or rows.max() >= len(stands_for):
            return f"{self.name} reads row {rows.max()} of a table of {len(stands_for)}"
        return stands_for[rows]


def find_id_readers(graph: Graph) -> tuple[IdReader, ...]:
    """Every place of a graph where ids become angles, in its order."""
    depends = _dependencies(graph)
    tables = _tables(graph, depends)
    return tuple(
        reader
        for node in graph.nodes
        for reader in (_as_reader(graph, node, depends, tables),)
        if reader is not None
    )


def _as_reader(
    graph: Graph, node: GraphNode, depends: Mapping[str, _Depends], tables: set[str]
) -> IdReader | None:
    name = f"{node.op_type} {node.name}"
    if node.op_type == _ROTARY and node.domain in _ROTARY_INPUTS:
        places = _ROTARY_INPUTS[node.domain]
        ids, cos, sin = (node.inputs[i] if i < len(node.inputs) else "" for i in places)
        if not ids:
            # It is given cosines and sines that others have made of ids.
            return None
        known = cos and sin and not depends[cos] and not depends[sin]
        return IdReader(name=name, ids_name=ids, tables=(cos, sin) if known else ())
    if node.domain not in _STANDARD:
        return None
    if node.op_type in _TRIGONOMETRY and depends[node.inputs[0]]:
        ids = _ids_behind(graph, node.inputs[0], depends)
        return IdReader(name=name, ids_name=ids, choice=_choice_behind(graph, ids, depends))
    if node.op_type == "Gather" and node.inputs[0] in tables and depends[node.inputs[1]]:
        return IdReader(name=name, ids_name=node.inputs[1])
    return None


def _ids_behind(graph: Graph, angles: str, depends: Mapping[str, _Depends]) -> str:
    """The factor of the product behind some angles that is not the frequencies; empty if none."""
    waiting, seen = [angles], set[str]()
    while waiting:
        name = waiting.pop()
        index = graph.producers.get(name)
        if name in seen or index is None or not depends[name]:
            continue
        seen.add(name)
        node = graph.nodes[index]
        if node.domain in _STANDARD and node.op_type in _PRODUCTS and len(node.inputs) > 1:
            left, right = node.inputs[:2]
            if depends[left] != depends[right]:
                return left if depends[left] > depends[right] else right
        elif node.domain in _STANDARD and (
            node.op_type in _PASS_FIRST or _is_choice(node, depends)
        ):
            waiting.append(node.inputs[0])
        elif node.domain in _STANDARD and node.op_type in _PASS_ALL:
            waiting += node.inputs
    return ""


def _is_choice(node: GraphNode, depends: Mapping[str, _Depends]) -> bool:
    """Whether a node picks from its first input by a constant, as axes of ids are picked."""
    return node.op_type == "Gather" and not depends[node.inputs[1]]


def _choice_behind(graph: Graph, ids: str, depends: Mapping[str, _Depends]) -> str:
    """The constant by which each frequency was given the ids of one axis; empty if none."""
    index = graph.producers.get(ids)
    while index is not None and graph.nodes[index].domain in _STANDARD:
        node = graph.nodes[index]
        if _is_choice(node, depends):
            return node.inputs[1]
        index = graph.producers.get(node.inputs[0]) if node.op_type in _PASS_FIRST else None
    return ""


def _by_axis(found: Ids, axes: NDArray[Any], shape: tuple[int, ...]) -> Ids:
    """Ids [F, B, S] or [B, S, F] of frequencies as those of axes, [A, B, S].

    Of frequencies of one axis that differ, the furthest off from the first is taken; an axis that
    turns no frequency has no ids. What does not fit comes back as it is.
    """
    num_axes, batch, length = shape
    if found.size != len(axes) * batch * length:
        return found
    last = found.ndim > 2 and found.shape[-1] == len(axes)
    each = found.reshape(batch, length, -1) if last else found.reshape(-1, batch * length).T
    each = each.reshape(batch, length, len(axes))
    seen = np.full(shape, np.nan)
    for axis in range(num_axes):
        of_axis = each[..., axes == axis]
        if of_axis.size:
            first = of_axis[..., :1]
            furthest = np.abs(of_axis - first).argmax(axis=-1)[..., None]
            seen[axis] = np.take_along_axis(of_axis, furthest, axis=-1)[..., 0]
    return seen


def _dependencies(graph: Graph) -> dict[str, _Depends]:
    depends: dict[str, _Depends] = {"": 0, **dict.fromkeys(graph.initializers, 0)}
    depends.update(dict.fromkeys(graph.inputs, 2))
    for node, reads in zip(graph.nodes, graph.reads, strict=True):
        found: _Depends = max((depends.get(name, 2) for name in reads), default=0)
        if node.op_type in _SIZES and node.domain in _STANDARD:
            found = min(found, 1)
        depends.update(dict.fromkeys(node.outputs, found))
    return depends


def _tables(graph: Graph, depends: Mapping[str, _Depends]) -> set[str]:
    """Cosines and sines of all ids there are, worked out from constants, and what is made of it."""
    found: set[str] = set()
    for node, reads in zip(graph.nodes, graph.reads, strict=True):
        is_angle = node.op_type in _TRIGONOMETRY and node.domain in _STANDARD
        if (is_angle or reads & found) and not any(depends[name] for name in node.outputs):
            found.update(node.outputs)
    return found


def _ids_of_rows(cos: NDArray[Any], sin: NDArray[Any]) -> Ids:
    """Which id each row [d / 2] of a table [R, d / 2] stands for.

    From one row to the next the fastest column turns by less than half a turn, so that its angle
    can be followed from row to row, and is its row's number times a step.
    """
    angles = np.unwrap(
        np.arctan2(sin.astype(np.float64), cos.astype(np.float64)), axis=0, period=2 * np.pi
    )
    numbers = np.arange(len(angles), dtype=np.float64)
    # Least squares: how the numbers were rounded to 16 bits is as often too much as too little.
    steps = numbers @ angles / max(float(numbers @ numbers), 1.0)
    fastest = int(np.argmax(np.abs(steps)))
    ids: Ids = angles[:, fastest] / (steps[fastest] or 1.0)
    whole = np.rint(ids)
    return np.where(np.abs(ids - whole) < _NEAR, whole, ids)
