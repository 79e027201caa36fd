"""Dataclasses to and from what JSON knows, checking every key and type."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

from gap_export.errors import BundleError

T = TypeVar("T")

# Metadata of a field that came later: where it is missing, its default is what was meant then.
ADDED_LATER: Mapping[str, bool] = types.MappingProxyType({"added_later": True})
# Such a field, which is moreover written only where it is not its default.
RARE: Mapping[str, bool] = types.MappingProxyType({"added_later": True, "rare": True})


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: (f, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {
            name: to_plain(held)
            for name, (field, held) in fields.items()
            if not (field.metadata.get("rare") and held == field.default)
        }
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_plain(v) for v in value]
    return value


def differing_fields(one: Any, other: Any) -> Iterator[tuple[str, Any, Any]]:
    """Where two values differ: the path of each leaf that does, such as ``.mean``, and both.

    Args:
        one: A dataclass, a mapping, or what either may hold.
        other: Likewise.
    """
    one, other = to_plain(one), to_plain(other)
    if not (isinstance(one, dict) and isinstance(other, dict)):
        if one != other:
            yield "", one, other
        return
    for name in dict.fromkeys([*one, *other]):
        for path, seen, allowed in differing_fields(one.get(name), other.get(name)):
            yield f".{name}{path}", seen, allowed


def from_plain(cls: type[T], plain: Any, *, where: str) -> T:
    """Build a frozen dataclass from JSON data, checking every key and type.

    Only a field whose metadata is ``ADDED_LATER`` or ``RARE`` may be missing.

    Args:
        cls: The dataclass.
        plain: What ``json.loads`` gave.
        where: Named in error messages.

    Raises:
        BundleError: an unknown or missing key, or a value of the wrong type.
    """
    if not isinstance(plain, dict):
        raise BundleError(f"{where} must be an object", seen=type(plain).__name__)
    hints = typing.get_type_hints(cls)
    found = dataclasses.fields(cls)  # type: ignore[arg-type]
    names = [f.name for f in found]
    unknown = sorted(set(plain) - set(names))
    missing = [
        f.name for f in found if f.name not in plain and f.metadata.get("added_later") is None
    ]
    if unknown or missing:
        raise BundleError(
            f"{where}: wrong keys",
            seen=f"unknown {unknown or 'none'}, missing {missing or 'none'}",
            allowed=", ".join(names),
        )
    given = [n for n in names if n in plain]
    return cls(**{n: _convert(hints[n], plain[n], f"{where}: {n}") for n in given})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast("type[Any]", hint), value, where=where)
    if origin is Literal:
        if value in args and type(value) in {type(a) for a in args}:
            return value
        raise BundleError(where, seen=repr(value), allowed=", ".join(map(repr, args)))
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is tuple and isinstance(value, list):
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) == len(args):
            pairs = enumerate(zip(args, value, strict=True))
            return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in pairs)
    elif origin is not None and issubclass(origin, Mapping) and isinstance(value, dict):
        return {k: _convert(args[1], v, f"{where}.{k}") for k, v in value.items()}
    elif hint is float and type(value) in (int, float):
        return _finite(value, where)
    elif isinstance(hint, type) and type(value) is hint:
        return value
    raise BundleError(f"{where} has the wrong type", seen=repr(value), allowed=str(hint))


def _finite(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise BundleError(f"{where} is not a finite number", allowed="finite numbers")
    return number


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    failure: BundleError | None = None
    for arg in args:
        if arg is type(None):
            continue
        try:
            return _convert(arg, value, where)
        except BundleError as err:
            failure = err
    raise failure or BundleError(f"{where} has the wrong type", seen=repr(value))
