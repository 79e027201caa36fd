"""The pre-flight by our own table of what each TensorRT takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx

from gap_export.engines.operators import Operator, Release
from gap_export.exporting.preflight.finding import Finding, Kind
from gap_export.exporting.preflight.structure import (
    all_graphs,
    constant_names,
    scalar_constants,
    tensor_types,
)

# https://docs.nvidia.com/deeplearning/tensorrt/latest/reference/onnx-opset-guide.html
_MIN_OPSET = 9
# TensorRT has no such types (operators.md); float64 it reads as float32.
_NO_TYPES = frozenset({"string", "complex64", "complex128", "int16", "uint16", "uint32", "uint64"})
_STANDARD = ("", "ai.onnx")


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What is known of a model's tensors, by name."""

    types: Mapping[str, str]
    constants: frozenset[str]
    values: Mapping[str, int]


def look_up(model: onnx.ModelProto, release: Release, *, max_opset: int) -> list[Finding]:
    """What a release takes of a model.

    Args:
        model: As :func:`gap_export.exporting.preflight.structure.read_structure` has it.
        release: Which.
        max_opset: The highest opset that is documented for it.
    """
    facts = _Facts(
        types=tensor_types(model),
        constants=constant_names(model),
        values=scalar_constants(model),
    )
    opset = max((o.version for o in model.opset_import if o.domain in _STANDARD), default=0)
    findings = [*_check_types(facts), *_check_opset(opset, release, max_opset)]
    nodes: dict[Finding, list[str]] = {}
    for graph in all_graphs(model.graph):
        for node in graph.node:
            for finding in _check_node(node, facts, release, opset, max_opset):
                nodes.setdefault(finding, []).append(node.name or node.output[0])
    return findings + [_with_nodes(finding, names) for finding, names in nodes.items()]


def _check_types(facts: _Facts) -> Iterator[Finding]:
    for dtype in sorted(set(facts.types.values())):
        first = next(name for name, found in facts.types.items() if found == dtype)
        if dtype in _NO_TYPES:
            reason = f"there are no tensors of {dtype}; first one: {first}"
            yield Finding(kind="blocked", operator=None, reason=reason)
        elif dtype == "float64":
            reason = f"float64 is read as float32, and values are lost; first tensor: {first}"
            yield Finding(kind="unverified", operator=None, reason=reason)


def _check_opset(opset: int, release: Release, max_opset: int) -> Iterator[Finding]:
    documented = f"opset {opset}, documented are {_MIN_OPSET} to {max_opset}"
    if opset < _MIN_OPSET:
        yield Finding(kind="blocked", operator=None, reason=documented)
    elif opset > max(max_opset, release.known_opset):
        reason = f"{documented}, and it is built with an ONNX of opset {release.known_opset}"
        yield Finding(kind="blocked", operator=None, reason=reason)
    elif opset > max_opset:
        yield Finding(kind="unverified", operator=None, reason=documented)


def _check_node(
    node: onnx.NodeProto, facts: _Facts, release: Release, opset: int, max_opset: int
) -> Iterator[Finding]:
    name = node.op_type if node.domain in _STANDARD else f"{node.domain}::{node.op_type}"
    row = release.operators.get(name)
    if row is None:
        yield Finding(kind="unverified", operator=name, reason=f"nobody vouches for {name}")
    elif not row.dtypes:
        reason = f"{name} is refused ({release.evidence})"
        yield Finding(kind="blocked", operator=name, reason=reason)
    else:
        if opset > max_opset and _changed_since(name, max_opset, opset):
            reason = f"{name} means more in opset {opset} than in {max_opset}, the last documented"
            yield Finding(kind="unverified", operator=name, reason=reason)
        yield from _check_dtype(node, row, facts, release)
        for problem in _broken_rules(node, row, facts):
            reason = f"{name} {problem} ({release.evidence})"
            yield Finding(kind="blocked", operator=name, reason=reason)


def _check_dtype(
    node: onnx.NodeProto, row: Operator, facts: _Facts, release: Release
) -> Iterator[Finding]:
    if row.data is None:
        data = node.output[0]
    elif row.data < len(node.input):
        data = node.input[row.data]
    else:
        return
    dtype = facts.types.get(data)
    if dtype is None or dtype in row.dtypes or dtype in _NO_TYPES or dtype == "float64":
        return
    allowed = ", ".join(row.dtypes)
    # What is documented is less than what there is: Clip of integers is not, and the parser has it.
    kind: Kind = "blocked" if release.is_measured else "unverified"
    reason = f"{node.op_type} of {dtype} is not among {allowed} ({release.evidence})"
    yield Finding(kind=kind, operator=node.op_type, reason=reason)


def _broken_rules(node: onnx.NodeProto, row: Operator, facts: _Facts) -> Iterator[str]:
    inputs = dict(enumerate(node.input))
    for place in row.constants:
        if inputs.get(place) and inputs[place] not in facts.constants:
            yield f"needs a constant as input {place}"
    for place in row.absent:
        if inputs.get(place):
            yield f"takes no input {place}"
    if row.num_outputs is not None and any(node.output[row.num_outputs :]):
        yield f"has {row.num_outputs} output and no more"
    for attribute in node.attribute:
        allowed = row.attributes.get(attribute.name)
        value = _attribute_value(attribute)
        if allowed is not None and value not in allowed:
            yield f"takes {attribute.name} {', '.join(map(str, allowed))} alone, not {value}"
    for place, limit in row.limits.items():
        value = facts.values.get(inputs.get(place, ""))
        if value is not None and value > limit:
            yield f"takes at most {limit} as input {place}, not {value}"


def _attribute_value(attribute: onnx.AttributeProto) -> object:
    value = onnx.helper.get_attribute_value(attribute)
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _changed_since(name: str, old: int, new: int) -> bool:
    """Whether an operator was defined anew between two opsets, in more than its dtypes."""
    before, after = (onnx.defs.get_schema(name, max_inclusive_version=v) for v in (old, new))
    if before.since_version == after.since_version:
        return False
    return _form(before) != _form(after)


def _form(schema: onnx.defs.OpSchema) -> object:
    return (
        [(value.name, value.option) for value in (*schema.inputs, *schema.outputs)],
        sorted((name, attr.type, attr.required) for name, attr in schema.attributes.items()),
    )


def _with_nodes(finding: Finding, names: list[str]) -> Finding:
    count = "1 node" if len(names) == 1 else f"{len(names)} nodes, the first"
    reason = f"{finding.reason}: {count} {names[0]}"
    return Finding(kind=finding.kind, operator=finding.operator, reason=reason)
