"""Which of a decoder's cache tensors holds keys and which values, by where they go.

A key is multiplied with the query before a Softmax, a value with what the Softmax gives. Names say
nothing of it, and a cache under wrong names is wrong in every step in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

import onnx_ir as ir

from gap_export.errors import PassError

Role = Literal["key", "value"]
_PARTS: tuple[Role, ...] = ("key", "value")


class _Attention(NamedTuple):
    """Which inputs of an operator are keys and values, and which are the cache."""

    roles: Mapping[int, Role]
    past: Mapping[Role, int]
    present: Mapping[int, Role]


def _attention(key: int, past: int) -> _Attention:
    return _Attention(
        roles={key: "key", key + 1: "value", past: "key", past + 1: "value"},
        past={"key": past, "value": past + 1},
        present={1: "key", 2: "value"},
    )


_OPERATORS: Mapping[tuple[str, str], _Attention] = MappingProxyType(
    {
        ("", "Attention"): _attention(1, 4),
        ("com.microsoft", "MultiHeadAttention"): _attention(1, 6),
        ("com.microsoft", "GroupQueryAttention"): _attention(1, 3),
    }
)
_PRODUCTS = frozenset({"Conv", "Einsum", "Gemm", "MatMul"})
_SOFTMAX = "Softmax"
# What hands a tensor on, whole or joined with other tensors; and which of its inputs is the tensor.
_MOVES: Mapping[str, tuple[int, ...] | None] = MappingProxyType(
    {
        **dict.fromkeys(("Cast", "Concat", "Identity", "Transpose"), None),
        **dict.fromkeys(
            ("CastLike", "Expand", "Flatten", "Gather", "Pad", "Reshape", "Slice", "Split"), (0,)
        ),
        **dict.fromkeys(("Squeeze", "Tile", "Unsqueeze"), (0,)),
        **dict.fromkeys(("ScatterElements", "ScatterND"), (0, 2)),
        "Where": (1, 2),
    }
)
# What scales or rotates it besides, before it is multiplied.
_CHANGES = frozenset({"Add", "Div", "Mul", "Neg", "RotaryEmbedding", "Sub"})


def check_cache_roles(graph: ir.Graph, num_layers: int) -> None:
    """See that cache tensors are what their names say, as far as the graph shows it.

    What cannot be followed (an operator that is not known, a softmax made of several) is left to
    the check of the patched bundle, which decodes with the cache and without.

    Args:
        graph: A decoder with ``past_key_values.{i}.key``, ``.value`` and ``present.{i}...``.
        num_layers: Layers of the cache.

    Raises:
        PassError: a tensor named a key is used as a value or the other way round, or a grown one
            is that of another tensor.
    """
    inputs = {str(value.name): value for value in graph.inputs}
    outputs = {str(value.name): value for value in graph.outputs}
    for layer in range(num_layers):
        for part in _PARTS:
            past = f"past_key_values.{layer}.{part}"
            grown = f"present.{layer}.{part}"
            _check_role(past, part, _roles(inputs[past]))
            sources = {str(value.name) for value in _sources(outputs[grown])} & inputs.keys()
            if sources and sources != {past}:
                raise _refused(
                    f"{grown} grows {', '.join(sorted(sources))}", f"{grown} grows {past}"
                )
            # The grown tensor, with its new slots, may be used under an earlier name in this step.
            value = outputs[grown]
            while not (roles := _roles(value)):
                node = value.producer()
                before = [] if node is None or node.op_type == "Concat" else list(_handed_on(node))
                if len(before) != 1:
                    break
                value = before[0]
            _check_role(grown, part, roles)


def _check_role(name: str, part: Role, seen: set[Role]) -> None:
    if seen and part not in seen:
        raise _refused(f"{name} is used as the {min(seen)}s", f"{name} is used as the {part}s")


def _refused(seen: str, allowed: str) -> PassError:
    return PassError(
        "a tensor of the decoder's KV cache is not what its name says",
        seen=seen,
        allowed=f"{allowed}; keys are multiplied with the query before the Softmax, values with "
        "what it gives",
        fix="export the decoder again: decoding with this cache gives other answers than without",
    )


def _roles(start: ir.Value) -> set[Role]:
    """What a tensor is used as; empty where the graph does not show it."""
    found: set[Role] = set()
    waiting, seen = [start], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        for node, index in value.uses():
            attention = _OPERATORS.get((node.domain, node.op_type))
            if attention is not None:
                found |= {role for at, role in attention.roles.items() if at == index}
            elif node.domain == "" and node.op_type in {"MatMul", "Einsum"}:
                factors = [v for at, v in enumerate(node.inputs) if at != index and v is not None]
                if any(_meets_softmax(factor, _before) for factor in factors):
                    found.add("value")
                elif _meets_softmax(
                    node.outputs[0], lambda v: [(n, list(n.outputs)) for n, _ in v.uses()]
                ):
                    found.add("key")
            elif _hands_on(node, index) or node.op_type in _CHANGES:
                waiting += node.outputs
    return found


def _before(value: ir.Value) -> list[tuple[ir.Node, list[ir.Value]]]:
    """The node that gives a value, with what it reads."""
    node = value.producer()
    return [] if node is None else [(node, [each for each in node.inputs if each is not None])]


def _meets_softmax(
    start: ir.Value, step: Callable[[ir.Value], list[tuple[ir.Node, list[ir.Value]]]]
) -> bool:
    """Whether a Softmax is met on the way, without passing through a product."""
    waiting, seen = [start], set[int]()
    while waiting:
        for node, values in step(waiting.pop()):
            if node.op_type == _SOFTMAX:
                return True
            if id(node) not in seen and node.op_type not in _PRODUCTS:
                seen.add(id(node))
                waiting += values
    return False


def _hands_on(node: ir.Node, index: int) -> bool:
    if node.domain != "" or node.op_type not in _MOVES:
        return False
    places = _MOVES[node.op_type]
    return places is None or index in places


def _handed_on(node: ir.Node) -> Iterator[ir.Value]:
    """The tensors that a node hands on."""
    for index, value in enumerate(node.inputs):
        if value is not None and _hands_on(node, index):
            yield value


def _sources(grown: ir.Value) -> Iterator[ir.Value]:
    """All that a grown cache tensor is put together from, as far back as nothing is computed."""
    waiting, seen = [grown], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        node = value.producer()
        if node is None:
            continue
        attention = _OPERATORS.get((node.domain, node.op_type))
        if attention is None:
            waiting += _handed_on(node)
            continue
        role = attention.present.get(list(node.outputs).index(value))
        at = None if role is None else attention.past[role]
        past = node.inputs[at] if at is not None and at < len(node.inputs) else None
        if past is not None:
            waiting.append(past)
