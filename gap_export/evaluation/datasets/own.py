"""A layout for images of one's own: ``questions.jsonl`` beside them.

Each line is a JSON object::

    {"image": "images/yard.jpg", "expression": "the dog on the left", "box": [12, 40, 118, 203]}

``image`` is a path below the folder, ``box`` [x1, y1, x2, y2] in pixels of the image. Optional:
``frame`` (``upright``, the default: boxes are of the image as displayed, turned as EXIF says;
``raw``: of the image as stored; the same in all lines about one image), ``kind`` (a type of
expression, reported by itself), ``split`` (in every line or in none) and ``id`` (else the number of
the line, from 0).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import get_args

from gap_export.errors import ImageError
from gap_export.evaluation.datasets.annotations import Annotation
from gap_export.evaluation.datasets.rows import Row, read_json_lines
from gap_export.evaluation.datasets.stored import KnownSet, is_file, name_after
from gap_export.evaluation.questions import ImageSource
from gap_export.runtime.images.files import open_encoded, read_file
from gap_export.runtime.images.image import TURNED_ON_ITS_SIDE, ImageFrame

LOOKED_FOR = "questions.jsonl"
ONLY_SPLIT = "all"
_KEYS = frozenset({"image", "expression", "box", "kind", "split", "id", "frame"})
_FRAMES: tuple[ImageFrame, ...] = get_args(ImageFrame)


class OwnSet:
    """A folder with ``questions.jsonl``.

    Args:
        folder: The folder.
    """

    layout = "questions.jsonl"

    def __init__(self, folder: Path) -> None:
        self.name = name_after(folder)
        self.files = (folder / LOOKED_FOR,)
        self.looked_in = str(folder)
        self._folder = folder

    def splits(self) -> tuple[str, ...]:
        """Those that its lines name, or ``all`` where they name none."""
        return tuple(dict.fromkeys(_split_of(row) for row in self._rows))

    def read(self, split: str) -> Iterator[Annotation]:
        """One annotation for each line."""
        sizes: dict[str, tuple[int, int] | None] = {}
        frames: dict[str, ImageFrame] = {}
        for number, row in enumerate(self._rows):
            if _split_of(row) != split:
                continue
            name = row.file_name("image")
            path = self._folder / name
            there = is_file(path)
            frame = _frame_of(row)
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
                box=row.corners("box"),
                image_size=sizes[name],
                kind=row.label("kind") if "kind" in row.values else None,
                split=split,
            )

    @cached_property
    def _rows(self) -> list[Row]:
        rows = list(read_json_lines(self.files[0]))
        for row in rows:
            unknown = sorted(row.values.keys() - _KEYS)
            if unknown:
                raise row.refuse(unknown[0], f"the keys {', '.join(sorted(_KEYS))}")
            if ("split" in row.values) != ("split" in rows[0].values):
                raise row.refuse("split", "in every line, or in none")
        return rows


def find(root: Path, known: KnownSet | None) -> list[OwnSet]:
    """The data set of this layout in a folder.

    Args:
        root: Where to look.
        known: Not None: a published data set is looked for, and none is stored so.
    """
    return [OwnSet(root)] if known is None and is_file(root / LOOKED_FOR) else []


def _split_of(row: Row) -> str:
    return row.label("split") if "split" in row.values else ONLY_SPLIT


def _frame_of(row: Row) -> ImageFrame:
    value = row.values.get("frame", "upright")
    for frame in _FRAMES:
        if value == frame:
            return frame
    raise row.refuse("frame", ", ".join(_FRAMES))


def _size(path: Path, frame: ImageFrame) -> tuple[int, int] | None:
    """Width and height of an image; None for a broken one, which is met when asked."""
    try:
        opened = open_encoded(read_file(path))
    except ImageError:
        return None
    width, height = opened.image.size
    turned = frame == "upright" and opened.orientation in TURNED_ON_ITS_SIDE
    return (height, width) if turned else (width, height)
