"""The layout of github.com/lichengunc/refer: ``refs(unc).p`` beside ``instances.json``.

``refs(*).p`` is a pickle, a list with an entry for every object referred to: ``ref_id``,
``ann_id``, ``image_id``, ``split`` and ``sentences``, each with ``sent_id`` and ``sent``.
``instances.json`` is of COCO's form: the boxes [x, y, width, height] and the images' names and
sizes. Each sentence is a question, with the id ``<ref_id>-<sent_id>``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from gap_export.errors import UsageError
from gap_export.evaluation.datasets.annotations import Annotation
from gap_export.evaluation.datasets.rows import Row, read_json, shorten
from gap_export.evaluation.datasets.safe_pickle import read_plain_pickle
from gap_export.evaluation.datasets.stored import (
    Images,
    KnownSet,
    StoredSet,
    is_file,
    matching_files,
    may_be_in,
    name_after,
)

LOOKED_FOR = "refs(unc|umd|google).p beside instances.json"
_INSTANCES = "instances.json"
_REFS = re.compile(r"refs\((?P<split_by>\w+)\)\.p", re.ASCII)
# Below ROOT: where the folder of a data set is.
_BASES = ("", "data", "refer", "refer/data", "annotations")


def find(root: Path, known: KnownSet | None) -> list[StoredSet]:
    """The data sets of this layout in a folder; those with a known name also in folders below."""
    if known is None:
        if not is_file(root / _INSTANCES):
            return []
        return [
            _stored(name_after(root, match["split_by"]), root, file)
            for match, file in matching_files(root, _REFS)
        ]
    folders = [root / base / name for base in _BASES for name in known.folders[:1]]
    if may_be_in(root, known):
        folders.insert(0, root)
    files = [folder / f"refs({known.split_by}).p" for folder in folders]
    return [
        _stored(known.name, root, file)
        for file in files
        if is_file(file) and is_file(file.parent / _INSTANCES)
    ]


def _stored(name: str, root: Path, refs_file: Path) -> StoredSet:
    images = Images(root)

    @cache
    def refs() -> list[Row]:
        plain = read_plain_pickle(refs_file)
        if not isinstance(plain, list):
            raise UsageError(
                "the references cannot be used",
                seen=f"{refs_file}: {shorten(plain)}",
                allowed="a list of references",
            )
        return [Row.of(entry, f"{refs_file}, reference {n}") for n, entry in enumerate(plain)]

    @cache
    def instances() -> list[dict[int, Row]]:
        """Objects and images by their ids."""
        file = refs_file.parent / _INSTANCES
        whole = Row.of(read_json(file), str(file))
        tables: list[dict[int, Row]] = []
        for key in ("annotations", "images"):
            by_id: dict[int, Row] = {}
            for number, plain in enumerate(whole.entries(key)):
                row = Row.of(plain, f"{file}, {key} {number}")
                if by_id.setdefault(row.integer("id"), row) is not row:
                    raise row.refuse("id", "another one for each entry")
            tables.append(by_id)
        return tables

    def read(split: str) -> Iterator[Annotation]:
        """One annotation for each sentence of each reference."""
        boxes, stored_images = instances()
        for ref in refs():
            if ref.label("split") != split:
                continue
            box = _entry(boxes, ref.integer("ann_id"), ref.where, "annotations")
            image = _entry(stored_images, ref.integer("image_id"), ref.where, "images")
            if box.integer("image_id") != ref.integer("image_id"):
                raise ref.refuse("image_id", f"that of its box, {box.integer('image_id')}")
            name = image.file_name("file_name")
            source = images.find(name)
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
                    split=split,
                )

    return StoredSet(
        name=name,
        layout="refer",
        files=(refs_file,),
        looked_in=images.looked_in,
        splits=lambda: tuple(dict.fromkeys(ref.label("split") for ref in refs())),
        read=read,
    )


def _entry(rows: dict[int, Row], wanted: int, where: str, key: str) -> Row:
    if wanted not in rows:
        raise UsageError(
            f"a reference names an entry that {key} of {_INSTANCES} has not got",
            seen=f"{where}: {wanted}",
            fix="both files must be of the same data set",
        )
    return rows[wanted]
