"""Where a decoder's graph turns position ids into angles, and whether ids go there alone.

Four forms are known: a Cos or Sin of the product of ids and frequencies; rows taken by id from a
constant table; a RotaryEmbedding that takes ids and does so itself; one that takes rows of such a
Cos and Sin by number. No name is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gap_export.errors import PassError
from gap_export.graph.onnx_file import BFLOAT16, DOUBLE, FLOAT, FLOAT16, Node, OnnxFile
from gap_export.graph.seen_ids import IdReader

_TRIGONOMETRY = ("Cos", "Sin")
_ROTARY = "RotaryEmbedding"
# Inputs of RotaryEmbedding by domain: ids, cosines, sines.
_ROTARY_INPUTS: Mapping[str, tuple[int, int, int]] = {
    "": (3, 1, 2),
    "ai.onnx": (3, 1, 2),
    "com.microsoft": (1, 2, 3),
}
_PRODUCTS = ("Einsum", "MatMul", "Mul")
# What hands its first input on as it is, or rounded, or in another shape.
_RESHAPES = ("CastLike", "Expand", "Flatten", "Reshape", "Squeeze", "Tile", "Unsqueeze")
_PASS_FIRST = (*_RESHAPES, "Cast", "Identity", "Slice", "Transpose")
# What turns ids into angles and keeps a token's angle a function of its own id.
_BY_TOKEN = (*_PRODUCTS, "Cast", "Concat", "Identity", "Transpose")
_SIZES = ("Shape", "Size")
_HALF = (FLOAT16, BFLOAT16)
_FLOATS = (FLOAT, DOUBLE, *_HALF)
_LOOKED_FOR = "Cos and Sin, RotaryEmbedding, or a Gather from a constant table"
_MAX_SHOWN = 4
# torch writes "to the end" as the largest integer, or as one above any length.
_TO_THE_END = (1 << 31) - 1

# What a value depends on: nothing that is fed; sizes of what is fed; what is fed.
_Depends = Literal[0, 1, 2]


def find_id_readers(graph: OnnxFile) -> tuple[IdReader, ...]:
    """Every place of a graph where ids become angles, in its order."""
    values = _Values(graph.nodes, graph)
    found = []
    for node in graph.nodes:
        place = values.place_of_ids(node)
        given = "" if place is None or place >= len(node.inputs) else node.inputs[place]
        # Without ids of its own, a RotaryEmbedding reads cosines that another node made.
        if not given or not values.depends[given]:
            continue
        tables: tuple[str, str] | tuple[()] = ()
        choice = rows = ""
        if node.is_standard(*_TRIGONOMETRY):
            given = _ids_behind(graph, given, values.depends)
            choice = _choice_behind(graph, given, values.depends)
        elif node.op_type == _ROTARY:
            places = _ROTARY_INPUTS[node.domain][1:]
            cos, sin = (node.inputs[i] if i < len(node.inputs) else "" for i in places)
            known = cos and sin and not values.depends[cos] and not values.depends[sin]
            tables = (cos, sin) if known else ()
            if cos and values.depends[cos] == 2:
                turned = _find_behind(graph, cos, lambda node: node.is_standard(*_TRIGONOMETRY))
                rows, angles = given, "" if turned is None else turned.inputs[0]
                given = _ids_behind(graph, angles, values.depends)
                choice = _choice_behind(graph, given, values.depends)
        name = f"{node.op_type} {node.name}"
        found.append(IdReader(name=name, ids_name=given, choice=choice, tables=tables, rows=rows))
    return tuple(found)


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


def find_position_reach(graph: OnnxFile, position_ids: str) -> PositionReach:
    """Follow the position ids of a decoder, into branches and loops as well.

    A remapped id is larger than its slot. That is what RoPE must see and a causal mask must not, so
    a graph in which ids go anywhere but to RoPE is refused, and so is one whose RoPE, or a part of
    it, does not come from them.

    Args:
        graph: The decoder's.
        position_ids: Name of the input.

    Raises:
        PassError: as above, with what was looked for and what was found.
    """
    nodes, values = graph.all_nodes, _Values(graph.all_nodes, graph)
    readers: dict[str, list[tuple[Node, int]]] = {}
    for node in nodes:
        for index, name in enumerate(node.inputs):
            readers.setdefault(name, []).append((node, index))
    # Attention that rotates by itself counts slots, not position ids: GroupQueryAttention
    # may be given ids, but of a prompt reads the first of them alone.
    own = [node for node in (*nodes, *graph.function_nodes) if node.integer("do_rotary")]
    if own:
        raise PassError(
            "attention rotates by itself (do_rotary) and counts slots, so that no id can be kept",
            seen=_list(own),
            allowed=_LOOKED_FOR,
            fix="export the decoder with the rotary embedding outside of attention",
        )
    # Nodes by identity, since names may be missing.
    anchors: dict[int, Node] = {}
    passed: dict[int, Node] = {}
    waiting = [position_ids]
    while waiting:
        name = waiting.pop()
        for node, index in readers.get(name, []):
            if node.is_standard(*_SIZES):
                continue
            if values.place_of_ids(node) == index:
                anchors[id(node)] = node
            elif not _keeps_tokens_apart(node, index, graph, values):
                raise PassError(
                    "the position ids do not go to the rotary embedding alone",
                    seen=f"{_name(node)} reads {name}",
                    allowed=_LOOKED_FOR,
                    fix="what compares ids with each other, such as a causal mask, must be made "
                    "from the cache's length; export the decoder so",
                )
            elif id(node) not in passed:
                passed[id(node)] = node
                waiting += filter(None, node.outputs)
    if not anchors:
        raise PassError(
            "the position ids do not reach a rotary embedding",
            seen=f"{position_ids} is read by {_list(n for n, _ in readers.get(position_ids, []))}",
            allowed=_LOOKED_FOR,
            fix="export the decoder so that RoPE reads its position_ids input",
        )
    others = list(_unreached(graph, values, anchors))
    if others:
        raise PassError(
            "a part of the rotary embedding does not come from position_ids",
            seen=_list(others),
            allowed=_LOOKED_FOR + ", reached from position_ids",
            fix="export the decoder so that all of RoPE reads its position_ids input",
        )
    rounded = [n for n in passed.values() if n.is_standard("Cast") and n.integer("to") in _HALF]
    return PositionReach(
        rotary=tuple(map(_name, anchors.values())), rounded=tuple(map(_name, rounded))
    )


class _Values:
    """What the values of some nodes depend on, by name."""

    def __init__(self, nodes: Sequence[Node], graph: OnnxFile | None) -> None:
        self.depends: dict[str, _Depends] = {"": 0}
        self._dtypes: Mapping[str, int] = {}
        if graph is not None:
            self.depends |= dict.fromkeys(graph.initializers, 0)
            self.depends.update(dict.fromkeys(graph.inputs, 2))
            self._dtypes = graph.dtypes
        for node in nodes:
            found: _Depends = max((self.depends.get(name, 2) for name in node.reads), default=0)
            if node.is_standard(*_SIZES):
                found = min(found, 1)
            self.depends.update(dict.fromkeys(filter(None, node.outputs), found))

    def is_constant(self, name: str) -> bool:
        """Whether no input of the graph has a part in a value, but for sizes."""
        return self.depends.get(name, 2) < 2

    def place_of_ids(self, node: Node) -> int | None:
        """Which input of a node takes ids, or angles of them, to a rotation; None of others."""
        if node.op_type == _ROTARY and node.domain in _ROTARY_INPUTS:
            return _ROTARY_INPUTS[node.domain][0]
        if node.is_standard(*_TRIGONOMETRY):
            return 0
        if node.is_standard("Gather") and self.is_constant(node.inputs[0]):
            # Rows may be taken by id from a table of floats; one of booleans is a causal mask.
            return 1 if self._dtypes.get(node.inputs[0], FLOAT) in _FLOATS else None
        return None


def _find_behind(graph: OnnxFile, name: str, is_it: Callable[[Node], bool]) -> Node | None:
    """The nearest such node behind a value, which is handed on as it is, reshaped or rounded."""
    index = graph.producers.get(name)
    while index is not None:
        node = graph.nodes[index]
        if is_it(node):
            return node
        index = graph.producers.get(node.inputs[0]) if node.is_standard(*_PASS_FIRST) else None
    return None


def _ids_behind(graph: OnnxFile, angles: str, depends: Mapping[str, _Depends]) -> str:
    """The factor of the product behind some angles that is not the frequencies; empty if none."""
    waiting, seen = [angles], set[str]()
    while waiting:
        name = waiting.pop()
        index = graph.producers.get(name)
        if name in seen or index is None or not depends[name]:
            continue
        seen.add(name)
        node = graph.nodes[index]
        if node.is_standard(*_PRODUCTS) and len(node.inputs) > 1:
            left, right = node.inputs[:2]
            if depends[left] != depends[right]:
                return left if depends[left] > depends[right] else right
        elif node.is_standard(*_PASS_FIRST) or _is_choice(node, depends):
            waiting.append(node.inputs[0])
        elif node.is_standard("Concat"):
            waiting += node.inputs
    return ""


def _is_choice(node: Node, depends: Mapping[str, _Depends]) -> bool:
    """Whether a node picks from its first input by a constant, as axes of ids are picked."""
    return node.is_standard("Gather") and not depends[node.inputs[1]]


def _choice_behind(graph: OnnxFile, ids: str, depends: Mapping[str, _Depends]) -> str:
    """The constant by which each frequency was given the ids of one axis; empty if none."""
    node = _find_behind(graph, ids, lambda node: _is_choice(node, depends))
    return "" if node is None else node.inputs[1]


def _keeps_tokens_apart(node: Node, index: int, graph: OnnxFile, values: _Values) -> bool:
    """Whether each token's part of a result is a function of its own id."""
    if node.is_standard(*_BY_TOKEN):
        return True
    if node.is_standard(*_RESHAPES):
        return index == 0
    if node.is_standard("Add", "Sub"):
        return values.is_constant(node.inputs[1 - index])
    if not node.is_standard("Slice") or index != 0:
        return False
    # A Slice in name only, as traces of ``ids[:, None, :]`` have them.
    starts, ends = (graph.integers(name) for name in node.inputs[1:3])
    steps = graph.integers(node.inputs[4]) if len(node.inputs) > 4 else [1]
    return (
        starts is not None
        and ends is not None
        and steps is not None
        and not any(starts)
        and min(ends, default=0) >= _TO_THE_END
        and set(steps) <= {1}
    )


def _unreached(graph: OnnxFile, values: _Values, anchors: Mapping[int, Node]) -> Iterator[Node]:
    """Nodes that rotate or compute angles of something else than the ids."""
    made_of_ids: set[str] = set()
    for node in graph.all_nodes:
        if id(node) in anchors or made_of_ids.intersection(node.inputs):
            made_of_ids.update(filter(None, node.outputs))
    for nodes, known in (
        (graph.all_nodes, values),
        (graph.function_nodes, _Values(graph.function_nodes, None)),
    ):
        for node in nodes:
            if id(node) in anchors:
                continue
            if node.is_standard(*_TRIGONOMETRY) and not known.is_constant(node.inputs[0]):
                yield node
            elif node.op_type == _ROTARY:
                # One without ids of its own reads a cosine that may come from an anchor.
                has_ids = len(node.inputs) > 3 and node.inputs[3]
                if not node.is_standard(_ROTARY) or has_ids or node.inputs[1] not in made_of_ids:
                    yield node


def _name(node: Node) -> str:
    return f"{node.op_type} {node.name or '(no name)'}"


def _list(nodes: Iterable[Node]) -> str:
    names = list(dict.fromkeys(map(_name, nodes)))
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return (", ".join(names[:_MAX_SHOWN]) or "no node") + more
