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
from gap_export.evaluation.datasets.rows import Row, is_inside, read_json_rows
from gap_export.evaluation.datasets.stored import Images, KnownSet, image_of, is_file
from gap_export.evaluation.questions import ImageSource

LOOKED_FOR = "<set>_<split>.json"
_NAME = re.compile(r"(?P<set>.+)_(?P<split>train|val|testA|testB|test)\.json", re.DOTALL)
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")


class PerSplitSet:
    """A data set with one JSON file for each split.

    Args:
        name: Of the data set.
        root: Below it are the images.
        by_split: The files.
    """

    layout = "per-split JSON"

    def __init__(self, name: str, root: Path, by_split: Mapping[str, Path]) -> None:
        self.name = name
        self.files = tuple(by_split.values())
        self._by_split = by_split
        self._images = Images(root)

    @property
    def looked_in(self) -> str:
        """Where its images are looked for."""
        return self._images.looked_in

    def splits(self) -> tuple[str, ...]:
        """Those that have a file."""
        return tuple(self._by_split)

    def read(self, split: str) -> Iterator[Annotation]:
        """One annotation for each sentence of each row."""
        sources: dict[str, ImageSource | None] = {}
        for number, row in enumerate(read_json_rows(self._by_split[split])):
            image = _image_name(row)
            if image not in sources:
                sources[image] = self._images.find(image)
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


def find(root: Path, known: KnownSet | None) -> list[PerSplitSet]:
    """The data sets of this layout in a folder.

    Args:
        root: Where to look.
        known: Which to look for, also in a folder of its name; None: any, in the folder itself.
    """
    if known is not None and not known.is_default:
        return []
    folders = [root] if known is None else [root, root / known.folders[0]]
    found: list[PerSplitSet] = []
    for folder in folders:
        by_set: dict[str, dict[str, Path]] = {}
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            match = _NAME.fullmatch(file.name)
            if match is not None and is_file(file):
                by_set.setdefault(match["set"], {})[match["split"]] = file
        found += [
            PerSplitSet(name, root, by_split)
            for name, by_split in by_set.items()
            if known is None or name == known.folders[0]
        ]
    return found


def _image_name(row: Row) -> str:
    """The image's file; one without an ending is a JPEG."""
    name = image_of(row.text("img_id"))
    if not is_inside(name):
        raise row.refuse("img_id", "the name of an image")
    return name if PurePosixPath(name).suffix.lower() in _SUFFIXES else f"{name}.jpg"
