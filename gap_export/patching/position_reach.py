"""Where a decoder's position ids go: to RoPE, and nowhere else."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import onnx_ir as ir

from gap_export.errors import PassError
from gap_export.graph.passes.matching import constant
from gap_export.patching.read_graph import all_nodes

_ROTARY = "RotaryEmbedding"
# Which input of an operator takes position ids, by domain.
_ROTARY_IDS = {"": 3, "com.microsoft": 1}
_TRIGONOMETRY = frozenset({"Cos", "Sin"})
# What turns ids into angles and keeps a token's angle a function of its own id. For those in the
# second line ids must be the first input: the others say where to put them.
_BY_TOKEN = frozenset({"Cast", "Concat", "Einsum", "Identity", "MatMul", "Mul", "Transpose"})
_BY_SHAPE = frozenset({"CastLike", "Expand", "Flatten", "Reshape", "Squeeze", "Tile", "Unsqueeze"})
_SIZE_ONLY = frozenset({"Shape", "Size"})
_HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_LOOKED_FOR = "Cos and Sin, RotaryEmbedding, or a Gather from a constant table"
_MAX_SHOWN = 4
# torch writes "to the end" as the largest integer, or as one above any length.
_TO_THE_END = 1 << 31


@dataclass(frozen=True, kw_only=True)
class PositionReach:
    """Where position ids arrive.

    Attributes:
        rotary: Operator and name of each node that turns ids, or angles of them, into a rotation.
        rounded: Nodes that round ids or angles to 16 bits before that: float16 holds whole numbers
            up to 2048 exactly, so later ids are not exact, in the graph as it came, too.
    """

    rotary: tuple[str, ...]
    rounded: tuple[str, ...]


def find_position_reach(model: ir.Model, position_ids: ir.Value) -> PositionReach:
    """Follow the position ids of a decoder.

    A remapped id is larger than its slot. That is what RoPE must see and a causal mask must not, so
    a graph in which ids go anywhere but to RoPE is refused, and so is one whose RoPE, or a part of
    it, does not come from them.

    Args:
        model: The decoder's.
        position_ids: Its input.

    Raises:
        PassError: as above, with what was looked for and what was found.
    """
    _refuse_own_rotary(model)
    walk = _Walk(model)
    walk.follow(position_ids)
    if not walk.anchors:
        raise PassError(
            "the position ids do not reach a rotary embedding",
            seen=f"{position_ids.name} is read by {_list(n for n, _ in position_ids.uses())}",
            allowed=_LOOKED_FOR,
            fix="export the decoder so that RoPE reads its position_ids input",
        )
    _refuse_other_rotary(model, walk)
    return PositionReach(
        rotary=tuple(map(_name, walk.anchors.values())),
        rounded=tuple(map(_name, walk.rounded.values())),
    )


class _Walk:
    """Follows values forward until RoPE; nodes by identity, since names may be missing."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._seen: set[int] = set()
        self.anchors: dict[int, ir.Node] = {}
        self.rounded: dict[int, ir.Node] = {}

    def follow(self, start: ir.Value) -> None:
        waiting = [start]
        while waiting:
            value = waiting.pop()
            for node, index in value.uses():
                # Shapes of ids are no ids.
                if node.op_type in _SIZE_ONLY and node.domain == "":
                    continue
                if _is_anchor(node, index):
                    self.anchors[id(node)] = node
                elif not _keeps_tokens_apart(node, index):
                    raise PassError(
                        "the position ids do not go to the rotary embedding alone",
                        seen=f"{_name(node)} reads {value.name}",
                        allowed=_LOOKED_FOR,
                        fix="whatever compares ids with each other, such as a causal mask, must be "
                        "made from the cache's length; export the decoder so",
                    )
                elif id(node) not in self._seen:
                    self._seen.add(id(node))
                    self._note_rounding(node)
                    waiting += node.outputs

    def _note_rounding(self, node: ir.Node) -> None:
        to = node.attributes.get("to")
        if node.op_type == "Cast" and to is not None and ir.DataType(to.as_int()) in _HALF:
            self.rounded[id(node)] = node


def _is_anchor(node: ir.Node, index: int) -> bool:
    if node.op_type == _ROTARY:
        return _ROTARY_IDS.get(node.domain) == index
    if node.domain != "":
        return False
    if node.op_type in _TRIGONOMETRY:
        return True
    return node.op_type == "Gather" and index == 1 and _is_table_of_angles(node.inputs[0])


def _is_table_of_angles(value: ir.Value | None) -> bool:
    """Whether rows may be taken from it by id; a table of booleans is a causal mask."""
    dtype = None if value is None else value.dtype
    return (dtype is None or dtype.is_floating_point()) and _is_made_of_constants(value)


def _keeps_tokens_apart(node: ir.Node, index: int) -> bool:
    if node.domain != "":
        return False
    if node.op_type in _BY_TOKEN:
        return True
    if node.op_type in _BY_SHAPE:
        return index == 0
    if node.op_type == "Slice":
        return index == 0 and (_takes_all(node) or _picks_on_fixed_axes(node))
    if node.op_type in {"Gather", "Split"}:
        return index == 0 and _picks_on_fixed_axes(node)
    if node.op_type in {"Add", "Sub"}:
        return _is_made_of_constants(node.inputs[1 - index])
    return False


def _picks_on_fixed_axes(node: ir.Node) -> bool:
    """Whether a Gather, Slice or Split picks, by constants, on axes of a fixed size.

    Such are the position axes of M-RoPE, and frequencies; that of tokens has no fixed size.
    """
    data, *choice = node.inputs
    assert data is not None
    if data.shape is None or not all(map(_is_made_of_constants, filter(None, choice))):
        return False
    picked = [node.attributes["axis"].as_int() if "axis" in node.attributes else 0]
    if node.op_type == "Slice":
        axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
        if axes is None:
            return False
        picked = [int(axis) for axis in axes]
    return all(isinstance(data.shape[axis], int) for axis in picked)


def _takes_all(node: ir.Node) -> bool:
    """Whether a Slice is one in name only, as traces of ``ids[:, None, :]`` have them."""
    starts, ends = constant(node.inputs[1]), constant(node.inputs[2])
    steps = constant(node.inputs[4]) if len(node.inputs) > 4 else None
    if starts is None or ends is None:
        return False
    return (
        not starts.any()
        and bool((ends >= _TO_THE_END - 1).all())
        and (steps is None or bool((steps == 1).all()))
    )


def _is_made_of_constants(value: ir.Value | None) -> bool:
    """Whether no input of the graph has a part in a value, but for sizes."""
    waiting, seen = [value], set[int]()
    while waiting:
        current = waiting.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if current.const_value is not None or current.is_initializer():
            continue
        producer = current.producer()
        if producer is None:
            return False
        if producer.op_type not in _SIZE_ONLY:
            waiting += producer.inputs
    return True


def _refuse_own_rotary(model: ir.Model) -> None:
    """Attention that rotates by itself counts slots, whatever position ids say.

    GroupQueryAttention may be given ids, but of a prompt reads the first of them alone.
    """
    own = [
        node
        for node in all_nodes(model)
        if "do_rotary" in node.attributes and node.attributes["do_rotary"].as_int()
    ]
    if own:
        raise PassError(
            "attention rotates by itself (do_rotary) and counts slots, so that no id can be kept",
            seen=_list(own),
            allowed=_LOOKED_FOR,
            fix="export the decoder with the rotary embedding outside of attention",
        )


def _refuse_other_rotary(model: ir.Model, walk: _Walk) -> None:
    others = [
        node
        for node in all_nodes(model)
        if id(node) not in walk.anchors
        and _is_rotary(node)
        and not _is_table(node)
        and not _is_fed_by(node, walk.anchors)
    ]
    if others:
        raise PassError(
            "a part of the rotary embedding does not come from position_ids",
            seen=_list(others),
            allowed=_LOOKED_FOR + ", reached from position_ids",
            fix="export the decoder so that all of RoPE reads its position_ids input",
        )


def _is_rotary(node: ir.Node) -> bool:
    return node.op_type == _ROTARY or (node.domain == "" and node.op_type in _TRIGONOMETRY)


def _is_table(node: ir.Node) -> bool:
    """Whether it works out a table of all angles, from which a Gather may take."""
    return node.op_type in _TRIGONOMETRY and _is_made_of_constants(node.inputs[0])


def _is_fed_by(node: ir.Node, anchors: Collection[int]) -> bool:
    """Whether a RotaryEmbedding without ids of its own reads a cosine that comes from ids."""
    own_ids = node.inputs[3] if len(node.inputs) > 3 else None
    if node.op_type != _ROTARY or node.domain != "" or own_ids is not None:
        return False
    waiting, seen = [node.inputs[1]], set[int]()
    while waiting:
        value = waiting.pop()
        producer = None if value is None else value.producer()
        if producer is None or id(producer) in seen:
            continue
        if id(producer) in anchors:
            return True
        seen.add(id(producer))
        waiting += producer.inputs
    return False


def _name(node: ir.Node) -> str:
    return f"{node.op_type} {node.name or '(no name)'}"


def _list(nodes: Iterable[ir.Node]) -> str:
    names = list(dict.fromkeys(map(_name, nodes)))
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return (", ".join(names[:_MAX_SHOWN]) or "nobody") + more
