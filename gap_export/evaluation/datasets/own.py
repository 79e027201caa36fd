"""A layout for a user's own images: ``questions.jsonl`` beside them.

Each line is a JSON object::

    {"image": "images/yard.jpg", "expression": "the dog on the left", "box": [12, 40, 118, 203]}

``image`` is a path below the folder, ``box`` [x1, y1, x2, y2] in pixels of the image, or null where
the image does not show the object. Optional:
``frame`` (``upright``, the default: boxes are of the image as displayed, turned as EXIF says;
``raw``: of the image as stored; the same in all lines about one image), ``kind`` (a type of
expression, reported by itself), ``split`` (in every line or in none) and ``id`` (else the number of
the line, from 0).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import get_args

from gap_export.errors import ImageError
from gap_export.evaluation.datasets.annotations import Annotation
from gap_export.evaluation.datasets.rows import Row, read_json_lines
from gap_export.evaluation.datasets.stored import KnownSet, StoredSet, is_file, name_after
from gap_export.evaluation.questions import ImageSource
from gap_export.runtime.images.files import open_encoded, read_file
from gap_export.runtime.images.image import TURNED_ON_ITS_SIDE, ImageFrame

LOOKED_FOR = "questions.jsonl"
ONLY_SPLIT = "all"
_KEYS = frozenset({"image", "expression", "box", "kind", "split", "id", "frame"})
_FRAMES: tuple[ImageFrame, ...] = get_args(ImageFrame)


def find(root: Path, known: KnownSet | None) -> list[StoredSet]:
    """The data set of this layout in a folder; no published one is stored so."""
    file = root / LOOKED_FOR
    if known is not None or not is_file(file):
        return []

    @cache
    def rows() -> list[Row]:
        found = list(read_json_lines(file))
        for row in found:
            unknown = sorted(row.values.keys() - _KEYS)
            if unknown:
                raise row.refuse(unknown[0], f"the keys {', '.join(sorted(_KEYS))}")
            if ("split" in row.values) != ("split" in found[0].values):
                raise row.refuse("split", "in every line, or in none")
        return found

    return [
        StoredSet(
            name=name_after(root),
            layout=LOOKED_FOR,
            files=(file,),
            looked_in=str(root),
            splits=lambda: tuple(dict.fromkeys(_split_of(row) for row in rows())),
            read=lambda split: _annotations(root, split, rows()),
        )
    ]


def _annotations(folder: Path, split: str, rows: Sequence[Row]) -> Iterator[Annotation]:
    """One annotation for each line of a split."""
    sizes: dict[str, tuple[int, int] | None] = {}
    frames: dict[str, ImageFrame] = {}
    for number, row in enumerate(rows):
        if _split_of(row) != split:
            continue
        name = row.file_name("image")
        path = folder / name
        there = is_file(path)
        value = row.values.get("frame", "upright")
        frame = next((each for each in _FRAMES if each == value), None)
        if frame is None:
            raise row.refuse("frame", ", ".join(_FRAMES))
        if frames.setdefault(name, frame) != frame:
            raise row.refuse("frame", f"{frames[name]}, as in the lines before about {name}")
        if name not in sizes:
            sizes[name] = _size(path, frame) if there else None
        yield Annotation(
            id=row.label("id") if "id" in row.values else str(number),
            image_id=name,
            image=ImageSource(path=path, frame=frame) if there else None,
            image_name=name,
            expression=row.text("expression"),
            box=None if row.values.get("box", 0) is None else row.corners("box"),
            image_size=sizes[name],
            kind=row.label("kind") if "kind" in row.values else None,
            split=split,
        )


def _split_of(row: Row) -> str:
    """The split that a line names, or ``all`` where lines name none."""
    return row.label("split") if "split" in row.values else ONLY_SPLIT


def _size(path: Path, frame: ImageFrame) -> tuple[int, int] | None:
    """Width and height of an image; None for a broken one, which is met when asked."""
    try:
        opened = open_encoded(read_file(path))
    except ImageError:
        return None
    width, height = opened.image.size
    turned = frame == "upright" and opened.orientation in TURNED_ON_ITS_SIDE
    return (height, width) if turned else (width, height)
