"""The layout of github.com/lichengunc/refer: ``refs(unc).p`` beside ``instances.json``.

``refs(*).p`` is a pickle, a list with an entry for every object referred to: ``ref_id``,
``ann_id``, ``image_id``, ``split`` and ``sentences``, each with ``sent_id`` and ``sent``.
``instances.json`` is of COCO's form: the boxes [x, y, width, height] and the images' names and
sizes. Each sentence is a question, with the id ``<ref_id>-<sent_id>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from gap_export.errors import UsageError
from gap_export.evaluation.datasets.annotations import Annotation
from gap_export.evaluation.datasets.rows import Row, read_json, shorten
from gap_export.evaluation.datasets.safe_pickle import read_plain_pickle
from gap_export.evaluation.datasets.stored import (
    Images,
    KnownSet,
    is_file,
    may_be_in,
    name_after,
)

LOOKED_FOR = "refs(unc|umd|google).p beside instances.json"
_INSTANCES = "instances.json"
_REFS = re.compile(r"refs\((?P<split_by>\w+)\)\.p", re.ASCII)
# Below ROOT: where the folder of a data set is.
_BASES = ("", "data", "refer", "refer/data", "annotations")


class ReferSet:
    """A data set of the refer repository.

    Args:
        name: Of the data set.
        root: Below it are the images.
        refs: The file ``refs(*).p``; ``instances.json`` is beside it.
    """

    layout = "refer"

    def __init__(self, name: str, root: Path, refs: Path) -> None:
        self.name = name
        self.files = (refs,)
        self._refs_file = refs
        self._images = Images(root)

    @property
    def looked_in(self) -> str:
        """Where its images are looked for."""
        return self._images.looked_in

    def splits(self) -> tuple[str, ...]:
        """The splits that its references name."""
        return tuple(dict.fromkeys(ref.label("split") for ref in self._refs))

    def read(self, split: str) -> Iterator[Annotation]:
        """One annotation for each sentence of each reference."""
        objects, images = self._instances
        for ref in self._refs:
            if ref.label("split") == split:
                object_id, image_id = ref.integer("ann_id"), ref.integer("image_id")
                where = ref.where
                box = _entry(objects, object_id, where, "annotations")
                image = _entry(images, image_id, where, "images")
                if box.integer("image_id") != image_id:
                    raise ref.refuse("image_id", f"that of its box, {box.integer('image_id')}")
                yield from self._sentences(ref, box, image)

    def _sentences(self, ref: Row, box: Row, image: Row) -> Iterator[Annotation]:
        name = image.file_name("file_name")
        source = self._images.find(name)
        for number, plain in enumerate(ref.entries("sentences")):
            sentence = Row.of(plain, f"{ref.where}, sentence {number}")
            yield Annotation(
                id=f"{ref.integer('ref_id')}-{sentence.integer('sent_id')}",
                image_id=str(ref.integer("image_id")),
                image=source,
                image_name=name,
                expression=sentence.text("sent"),
                box=box.box("bbox"),
                image_size=image.size("width", "height"),
                kind=None,
                split=ref.label("split"),
            )

    @cached_property
    def _refs(self) -> list[Row]:
        file = self._refs_file
        plain = read_plain_pickle(file)
        if not isinstance(plain, list):
            raise UsageError(
                "the references cannot be used",
                seen=f"{file}: {shorten(plain)}",
                allowed="a list of references",
            )
        return [Row.of(entry, f"{file}, reference {n}") for n, entry in enumerate(plain)]

    @cached_property
    def _instances(self) -> tuple[dict[int, Row], dict[int, Row]]:
        """Objects and images by their ids."""
        file = self._refs_file.parent / _INSTANCES
        whole = Row.of(read_json(file), str(file))
        objects, images = (_by_id(whole, key) for key in ("annotations", "images"))
        return objects, images


def find(root: Path, known: KnownSet | None) -> list[ReferSet]:
    """The data sets of this layout in a folder.

    Args:
        root: Where to look.
        known: Which to look for, also in folders below; None: any, in the folder itself.
    """
    if known is None:
        if not root.is_dir() or not is_file(root / _INSTANCES):
            return []
        found = [(_REFS.fullmatch(file.name), file) for file in sorted(root.iterdir())]
        return [
            ReferSet(name_after(root, match["split_by"]), root, file)
            for match, file in found
            if match is not None
        ]
    folders = [root / base / name for base in _BASES for name in known.folders[:1]]
    if may_be_in(root, known):
        folders.insert(0, root)
    files = [folder / f"refs({known.split_by}).p" for folder in folders]
    return [
        ReferSet(known.name, root, file)
        for file in files
        if is_file(file) and is_file(file.parent / _INSTANCES)
    ]


def _by_id(whole: Row, key: str) -> dict[int, Row]:
    rows = (
        Row.of(plain, f"{whole.where}, {key} {number}")
        for number, plain in enumerate(whole.entries(key))
    )
    found: dict[int, Row] = {}
    for row in rows:
        if found.setdefault(row.integer("id"), row) is not row:
            raise row.refuse("id", "another one for each entry")
    return found


def _entry(rows: dict[int, Row], wanted: int, where: str, key: str) -> Row:
    if wanted not in rows:
        raise UsageError(
            f"a reference names an entry that {key} of {_INSTANCES} has not got",
            seen=f"{where}: {wanted}",
            fix="both files must be of the same data set",
        )
    return rows[wanted]
