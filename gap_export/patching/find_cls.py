"""Finds where a foreign vision encoder drops the CLS token."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from gap_export.errors import PassError
from gap_export.graph.passes.matching import constant, describe, read_slice
from gap_export.patching.read_graph import with_shapes

# What mixes tokens: a path that meets one of these has left the projector for the tower.
_MIXING = frozenset({"Attention", "Conv", "MultiHeadAttention", "Softmax"})
_LOOKED_FOR = (
    "one Slice from 1 to the end, or one Gather of 1..N, on axis 1, between the vision tower and "
    "image_features"
)


@dataclass(frozen=True, kw_only=True)
class ClsDrop:
    """Where CLS goes.

    Attributes:
        hidden: [I, 1 + N, D], CLS first.
        patches: [I, N, D].
    """

    hidden: ir.Value
    patches: ir.Value


def find_cls_drop(features: ir.Value) -> ClsDrop:
    """Look backwards from the features for the one node that takes CLS away.

    Args:
        features: ``image_features``.

    Raises:
        PassError: none, several, or a way around it.
    """
    drops: dict[int, ir.Node] = {}
    seen: set[int] = set()
    waiting: list[ir.Value | None] = [features]
    while waiting:
        value = waiting.pop()
        node = None if value is None else value.producer()
        if node is None or id(node) in seen:
            continue
        seen.add(id(node))
        if _drops_first(node):
            drops[id(node)] = node
        elif node.op_type in _MIXING:
            raise PassError(
                "no CLS token is dropped on every way to image_features",
                seen=f"{describe(value)} reaches them",
                allowed=_LOOKED_FOR,
                fix="take another pruner",
            )
        elif node.op_type != "Shape":
            waiting += node.inputs
    if len(drops) != 1:
        names = ", ".join(f"{node.op_type} {node.name}" for node in drops.values())
        raise PassError(
            "it is not clear where the CLS token is dropped",
            seen=names or "no such node",
            allowed=_LOOKED_FOR,
            fix="take another pruner",
        )
    (drop,) = drops.values()
    assert drop.inputs[0] is not None
    return ClsDrop(hidden=drop.inputs[0], patches=drop.outputs[0])


def find_cls_attention(model: ir.Model, drop: ClsDrop, *, num_visual_tokens: int) -> ir.Value:
    """Attention weights of the layer that gave the features, [.., 1 + N, 1 + N], CLS first.

    The last of all Softmax nodes that the features rest on is taken: layers follow each other.

    Args:
        model: The vision encoder.
        drop: Where CLS goes.
        num_visual_tokens: N.

    Raises:
        PassError: no such node, or one of another shape.
    """
    rests_on = {drop.hidden.producer()}
    last = None
    # Backwards, each node comes after all that read it.
    for node in reversed(model.graph):
        if node in rests_on:
            if node.op_type in _MIXING:
                last = node
                break
            rests_on.update(node.predecessors())
    length = num_visual_tokens + 1
    axis = None if last is None else last.attributes.get_int("axis", -1)
    if last is not None and last.op_type == "Softmax" and axis is not None:
        values = (value for node in with_shapes(model).graph for value in node.outputs)
        shape = next((v.shape for v in values if v.name == last.outputs[0].name), None)
        rank = 0 if shape is None else shape.rank()
        square = shape is not None and rank in {3, 4} and list(shape)[-2:] == [length, length]
        if square and axis in {-1, rank - 1}:
            return last.outputs[0]
        seen = f"Softmax {last.name} {shape}, axis {axis}"
    else:
        seen = "no attention" if last is None else f"{last.op_type} {last.name}"
    raise PassError(
        "the vision encoder does not show what CLS attends to",
        seen=seen,
        allowed=f"a Softmax over the last of [.., {length}, {length}] in the last layer before "
        "image_features",
        fix="take another pruner",
    )


def _drops_first(node: ir.Node) -> bool:
    if node.domain != "":
        return False
    if node.op_type == "Slice":
        start, end, axis = read_slice(node) or (0, 0, 0)
        # Negative ends leave out tokens at the end; torch writes "to the end" as a huge number.
        return start == 1 and axis in {1, -2} and end > 1 << 30
    if node.op_type == "Gather" and node.attributes.get_int("axis", 0) in {1, -2}:
        index = constant(node.inputs[1])
        return index is not None and np.array_equal(index, np.arange(1, index.size + 1))
    return False
