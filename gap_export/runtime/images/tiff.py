"""The first directory of a TIFF file, which EXIF data is as well, read with nothing taken on trust.

TIFF 6.0, section 2, and BigTIFF. A tag that lies outside its file, or a directory made to use up
memory, is an error here, before an image library meets it.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ORIENTATION = 0x0112
# Bytes of one value, by the type's number.
_SIZES = {
    1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4,
    16: 8, 17: 8, 18: 8,
}  # fmt: skip
_UNSIGNED = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}
_MAX_TAGS = 1_000
# More strips or tiles than any image has; each costs an image library an object.
_MAX_VALUES = 100_000


@dataclass(frozen=True, kw_only=True)
class Directory:
    """Tags of the first image.

    Attributes:
        data: The whole file.
        order: ``<`` or ``>``, the order of bytes.
        tags: By number: type, number of values, and where in ``data`` they are.
    """

    data: bytes
    order: str
    tags: Mapping[int, tuple[int, int, int]]

    def integers(self, tag: int) -> tuple[int, ...]:
        """Unsigned values of a tag; empty where it is missing or of another type.

        Raises:
            ValueError: there are too many, or they lie outside the file.
        """
        kind, count, _ = self.tags.get(tag, (0, 0, 0))
        code = _UNSIGNED.get(kind)
        if code is None:
            return ()
        if count > _MAX_VALUES:
            raise ValueError(f"tag {tag} has {count} values; allowed: {_MAX_VALUES}")
        return struct.unpack(f"{self.order}{count}{code}", self.content(tag))

    def content(self, tag: int) -> bytes:
        """The bytes of a tag's values; empty where it is missing.

        Raises:
            ValueError: they lie outside the file.
        """
        kind, count, place = self.tags.get(tag, (1, 0, 0))
        found = self.data[place : place + count * _SIZES[kind]]
        if len(found) < count * _SIZES[kind]:
            raise ValueError(f"tag {tag} lies outside the file")
        return found

    def with_integer(self, tag: int, value: int) -> bytes:
        """The file with another value of a tag; itself where it has no such tag.

        Raises:
            ValueError: the tag lies outside the file.
        """
        kind, count, place = self.tags.get(tag, (0, 0, 0))
        if kind not in _UNSIGNED or count != 1:
            return self.data
        size = len(self.content(tag))
        changed = struct.pack(f"{self.order}{_UNSIGNED[kind]}", value)
        return self.data[:place] + changed + self.data[place + size :]

    def check(self) -> None:
        """Refuse tags that lie outside the file, or name more data than it has.

        Raises:
            ValueError: one does.
        """
        total = 0
        for tag, (kind, count, _) in self.tags.items():
            total += count * _SIZES[kind]
            if total > len(self.data):
                raise ValueError(f"tags up to {tag} hold more bytes than the file")
            self.content(tag)
            if kind in _UNSIGNED and kind != 1 and count > _MAX_VALUES:
                raise ValueError(f"tag {tag} has {count} values; allowed: {_MAX_VALUES}")


def read_directory(data: bytes) -> Directory:
    r"""Read the first directory of a TIFF file, or of EXIF data without ``Exif\0\0``.

    Raises:
        ValueError: not TIFF, or the directory is not complete.
    """
    if data[:4] not in SIGNATURES:
        raise ValueError("no TIFF header")
    order = "<" if data[:2] == b"II" else ">"
    big = data[:4] in SIGNATURES[2:]
    number, entry, inline = ("Q", "HHQQ", 8) if big else ("H", "HHII", 4)
    try:
        (start,) = struct.unpack_from(f"{order}{'Q' if big else 'I'}", data, 8 if big else 4)
        (count,) = struct.unpack_from(f"{order}{number}", data, start)
        if count > _MAX_TAGS:
            raise ValueError(f"{count} tags; allowed: {_MAX_TAGS}")
        tags: dict[int, tuple[int, int, int]] = {}
        place = start + struct.calcsize(f"={number}")
        for _ in range(count):
            tag, kind, values, offset = struct.unpack_from(f"{order}{entry}", data, place)
            place += struct.calcsize(f"={entry}")
            # Types that are not known are to be passed over.
            if kind in _SIZES:
                within = values * _SIZES[kind] <= inline
                tags.setdefault(tag, (kind, values, place - inline if within else offset))
    except (struct.error, OverflowError) as err:
        raise ValueError("the TIFF directory is not complete") from err
    return Directory(data=data, order=order, tags=tags)
