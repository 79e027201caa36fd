"""Protobuf's wire format (https://protobuf.dev/programming-guides/encoding/)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# Wire types.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Field:
    """One field of a message: its content where it has a length, else its number; all its bytes."""

    number: int
    content: memoryview | None
    value: int
    raw: memoryview


class Message:
    """A protobuf message, as far as its fields go."""

    def __init__(self, raw: memoryview) -> None:
        self.fields = tuple(read_fields(raw))

    def contents(self, *numbers: int) -> list[memoryview]:
        """What some fields hold, where that has a length."""
        return [f.content for f in self.fields if f.number in numbers and f.content is not None]

    def texts(self, number: int) -> tuple[str, ...]:
        """The strings of a field."""
        return tuple(bytes(content).decode() for content in self.contents(number))

    def text(self, number: int) -> str:
        """Of a field that should stand once and stands twice, protobuf takes the last."""
        return (self.texts(number) or ("",))[-1]

    def integers(self, number: int) -> list[int]:
        """Numbers of a field, packed or one by one."""
        found: list[int] = []
        for field in self.fields:
            if field.number == number and field.content is None:
                found.append(field.value)
            elif field.number == number and field.content is not None:
                at = 0
                while at < len(field.content):
                    value, at = _read_varint(field.content, at)
                    found.append(value)
        return [value - (1 << 64) if value >> 63 else value for value in found]


def read_fields(raw: memoryview) -> Iterator[Field]:
    """The fields of a protobuf message, in order.

    Raises:
        ValueError: not a message, or cut short.
        IndexError: cut short.
    """
    at = 0
    while at < len(raw):
        start = at
        key, at = _read_varint(raw, at)
        number, wire_type = key >> 3, key & 7
        content, value = None, 0
        if wire_type == _VARINT:
            value, at = _read_varint(raw, at)
        elif wire_type in {_FIXED64, _FIXED32}:
            at += 8 if wire_type == _FIXED64 else 4
        elif wire_type == _BYTES:
            size, at = _read_varint(raw, at)
            if at + size > len(raw):
                raise ValueError(f"a field of {size} bytes at {at} of {len(raw)}")
            content = raw[at : at + size]
            at += size
        else:
            raise ValueError(f"wire type {wire_type} at {at}")
        if at > len(raw):
            raise ValueError(f"ends at {at} of {len(raw)}")
        yield Field(number, content, value, raw[start:at])


def _read_varint(raw: memoryview, at: int) -> tuple[int, int]:
    """A base-128 number, least significant group first, and where the next byte is."""
    value = 0
    for shift in range(0, 70, 7):
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number longer than 10 bytes at {at}")


def write_field(number: int, content: bytes) -> bytes:
    """A field of some length."""
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def write_integer(number: int, value: int) -> bytes:
    """A field that is a number, of 0 or more."""
    return _varint(number << 3 | _VARINT) + _varint(value)


def _varint(value: int) -> bytes:
    """A number in groups of seven bits, the lowest first."""
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)
