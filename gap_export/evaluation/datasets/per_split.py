"""One JSON file for each split, as MiniGPT-4 has them: ``refcoco_val.json``.

A list with an entry for every expression: ``img_id`` (COCO_train2014_000000580957_4: the image's
name and a number), ``sents`` (a text, or a list of them), ``bbox`` [x, y, width, height], ``width``
and ``height``, all in pixels. An id is ``<split>-<row>``, with the place in the list if it is one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

from gap_export.evaluation.datasets.annotations import Annotation
from gap_export.evaluation.datasets.rows import is_inside, read_json_rows
from gap_export.evaluation.datasets.stored import (
    Images,
    KnownSet,
    StoredSet,
    image_of,
    matching_files,
)
from gap_export.evaluation.questions import ImageSource

LOOKED_FOR = "<set>_<split>.json"
_NAME = re.compile(r"(?P<set>.+)_(?P<split>train|val|testA|testB|test)\.json", re.DOTALL)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")


def find(root: Path, known: KnownSet | None) -> list[StoredSet]:
    """The data sets of this layout in a folder; a known one also in a folder of its name."""
    if known is not None and not known.is_default:
        return []
    folders = [root] if known is None else [root, root / known.folders[0]]
    found: list[StoredSet] = []
    for folder in folders:
        by_set: dict[str, dict[str, Path]] = {}
        for match, file in matching_files(folder, _NAME):
            by_set.setdefault(match["set"], {})[match["split"]] = file
        found += [
            _stored(name, root, by_split)
            for name, by_split in by_set.items()
            if known is None or name == known.folders[0]
        ]
    return found


def _stored(name: str, root: Path, by_split: Mapping[str, Path]) -> StoredSet:
    images = Images(root)

    def read(split: str) -> Iterator[Annotation]:
        """One annotation for each sentence of each row."""
        sources: dict[str, ImageSource | None] = {}
        for number, row in enumerate(read_json_rows(by_split[split])):
            image = image_of(row.text("img_id"))
            if not is_inside(image):
                raise row.refuse("img_id", "the name of an image")
            if PurePosixPath(image).suffix.lower() not in _SUFFIXES:
                image = f"{image}.jpg"
            if image not in sources:
                sources[image] = images.find(image)
            several = isinstance(row.values.get("sents"), list)
            for place, expression in enumerate(row.texts("sents")):
                yield Annotation(
                    id=f"{split}-{number}-{place}" if several else f"{split}-{number}",
                    image_id=image,
                    image=sources[image],
                    image_name=image,
                    expression=expression,
                    box=row.box("bbox"),
                    image_size=row.size("width", "height"),
                    kind=None,
                    split=split,
                )

    return StoredSet(
        name=name,
        layout="per-split JSON",
        files=tuple(by_split.values()),
        looked_in=images.looked_in,
        splits=lambda: tuple(by_split),
        read=read,
    )
