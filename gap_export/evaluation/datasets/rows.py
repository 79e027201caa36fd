"""Annotation files of unknown origin: read up to a size, every value checked for its type."""

from __future__ import annotations

import json
import math
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeGuard

from gap_export.errors import UsageError
from gap_export.parity.metrics import Box

# The instances of all of COCO's train2014 are 448 MB.
MAX_JSON_BYTES = 512 << 20
_MAX_LINE_BYTES = 1 << 20
_MAX_LABEL = 200
_MAX_SHOWN = 300
_DRIVE = re.compile("[A-Za-z]:")
# What other programs take for a whole number; a pickle may hold one of a million digits.
_MAX_INTEGER = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class Row:
    """One entry of an annotation file.

    Each method gives the value of a key, and raises a ``UsageError`` where that is missing or not
    what the method is for.

    Attributes:
        values: What it holds.
        where: What errors call it: file and row.
    """

    values: Mapping[str, object]
    where: str

    @classmethod
    def of(cls, plain: object, where: str) -> Row:
        """An entry, seen to be one.

        Raises:
            UsageError: not a mapping.
        """
        if not isinstance(plain, dict):
            raise UsageError(
                "an entry of the annotations that cannot be used",
                seen=f"{where}: {shorten(plain)}",
                allowed="an object with named values",
            )
        return cls(values=plain, where=where)

    def refuse(self, key: str, allowed: str) -> UsageError:
        """The error of a value that is missing, or not what it must be."""
        seen = shorten(self.values[key]) if key in self.values else "missing"
        return UsageError(
            f"{key} of an annotation cannot be used", seen=f"{self.where}: {seen}", allowed=allowed
        )

    def text(self, key: str) -> str:
        """A text, which may be empty."""
        value = self.values.get(key)
        if not _is_text(value):
            raise self.refuse(key, "a text")
        return value

    def label(self, key: str) -> str:
        """A short text for tables and messages, of characters that can be seen."""
        value = self.text(key)
        if not 0 < len(value) <= _MAX_LABEL or not value.isprintable():
            raise self.refuse(key, f"1 to {_MAX_LABEL} characters that can be printed")
        return value

    def integer(self, key: str) -> int:
        """A whole number of 64 bits."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.refuse(key, "a whole number")
        if abs(value) > _MAX_INTEGER:
            raise self.refuse(key, "a whole number of 64 bits")
        return value

    def entries(self, key: str) -> list[object]:
        """A list."""
        value = self.values.get(key)
        if not isinstance(value, list):
            raise self.refuse(key, "a list")
        return value

    def texts(self, key: str) -> list[str]:
        """A list of texts; one text alone is a list of one."""
        value = self.values.get(key)
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(map(_is_text, texts)):
            raise self.refuse(key, "a text, or a list of texts")
        return texts

    def size(self, width: str, height: str) -> tuple[int, int]:
        """Width and height of an image in pixels."""
        for key in (width, height):
            if self.integer(key) < 1:
                raise self.refuse(key, "pixels, at least 1")
        return self.integer(width), self.integer(height)

    def corners(self, key: str) -> Box:
        """A box stored as [x1, y1, x2, y2]."""
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) != 4 or not all(map(_is_finite, value)):
            raise self.refuse(key, "four finite numbers")
        first, second, third, fourth = map(float, value)
        return first, second, third, fourth

    def box(self, key: str) -> Box:
        """A box stored as [x, y, width, height], as its corners (x1, y1, x2, y2)."""
        x, y, width, height = self.corners(key)
        return x, y, x + width, y + height

    def file_name(self, key: str) -> str:
        """The path of a file below the data set's folder, with forward slashes.

        Links in that folder are followed: users put them there, to where they keep COCO.
        """
        name = self.text(key)
        if not is_inside(name):
            raise self.refuse(key, "a path below the data set's folder, with forward slashes")
        return name


def is_inside(name: str) -> bool:
    """Whether a path of an annotation stays below the folder it is joined to, on any system."""
    path = PurePosixPath(name)
    return (
        # No zero byte, and nothing that a terminal takes for a command.
        name.isprintable()
        and bool(path.parts)
        and not path.is_absolute()
        and ".." not in path.parts
        # Where a backslash parts folders, "C:" is a place of its own too.
        and _DRIVE.match(name) is None
        and "\\" not in name
    )


def shorten(value: object) -> str:
    """Any value in a few words."""
    try:
        text = reprlib.repr(value)
    except ValueError:
        # Python writes no number of more than some thousand digits.
        return "a number too large to be written"
    # Of lists in lists, six deep, there are many.
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def read_bytes(file: Path, *, max_bytes: int) -> bytes:
    """All of a file.

    Raises:
        UsageError: it cannot be read, or is larger than a file of its kind ever is.
    """
    try:
        size = file.stat().st_size
        if size > max_bytes:
            raise UsageError(
                "an annotation file is too large",
                seen=f"{file}: {size:,} bytes",
                allowed=f"at most {max_bytes:,} bytes",
            )
        return file.read_bytes()
    except OSError as err:
        raise UsageError("a file cannot be read", seen=f"{file}: {err.strerror or err}") from err


def read_json(file: Path) -> object:
    """What a JSON file holds.

    Raises:
        UsageError: it cannot be read, is too large, or is not JSON.
    """
    return _parse(read_bytes(file, max_bytes=MAX_JSON_BYTES), str(file))


def read_json_rows(file: Path) -> Iterator[Row]:
    """The entries of a JSON file that is a list.

    Raises:
        UsageError: it cannot be read, is too large, is not JSON or not a list of objects.
    """
    plain = read_json(file)
    if not isinstance(plain, list):
        raise UsageError(
            "the annotations cannot be used",
            seen=f"{file}: {shorten(plain)}",
            allowed="a list of objects",
        )
    for number, entry in enumerate(plain):
        yield Row.of(entry, f"{file}, row {number}")


def read_json_lines(file: Path) -> Iterator[Row]:
    """The entries of a file with one JSON object in each line; empty lines are passed over.

    Raises:
        UsageError: it cannot be read, a line is too long, or is not a JSON object.
    """
    try:
        with file.open("rb") as opened:
            number = 0
            while line := opened.readline(_MAX_LINE_BYTES + 1):
                number += 1
                where = f"{file}, line {number}"
                if len(line) > _MAX_LINE_BYTES:
                    raise UsageError(
                        "a line is too long", seen=where, allowed=f"{_MAX_LINE_BYTES:,} bytes"
                    )
                if line.strip():
                    yield Row.of(_parse(line, where), where)
    except OSError as err:
        raise UsageError("a file cannot be read", seen=f"{file}: {err.strerror or err}") from err


def _parse(raw: bytes, where: str) -> object:
    try:
        plain: object = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as err:
        raise UsageError("not JSON that can be read", seen=f"{where}: {err}") from err
    return plain


def _is_text(value: object) -> TypeGuard[str]:
    """Whether a value is text that can be written: half of a surrogate pair cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        # A whole number beyond what a float holds.
        return False
