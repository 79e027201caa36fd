"""Parquet files with the fields that lmms-lab uses on the Hugging Face Hub.

They are called ``data/val-00000-of-00004.parquet``. A row is an object: ``image`` (its encoded
bytes), ``answer`` (the expressions), ``bbox`` [x, y, width, height] in pixels and ``file_name``;
``question`` is a prompt, and is not read. Each answer is a question, with the id ``<split>-<row of
the split>-<place in it>``. Images stay in their files until they are asked about, and their sizes
are not annotated. Boxes are of the images as stored, as COCO's are.

The split ``val`` of lmms-lab's RefCOCO and RefCOCOg is not that of the papers: it holds Google's
together with UNC's or UMD's. ``testA``, ``testB`` and RefCOCOg's ``test`` are those of the papers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from gap_export.errors import UsageError
from gap_export.evaluation.datasets.annotations import Annotation
from gap_export.evaluation.datasets.parquet_images import (
    IMAGE,
    has_images,
    open_parquet,
    reading,
)
from gap_export.evaluation.datasets.rows import Row
from gap_export.evaluation.datasets.stored import (
    KnownSet,
    StoredSet,
    image_of,
    matching_files,
    may_be_in,
    name_after,
)
from gap_export.evaluation.questions import ImageSource
from gap_export.extras import require_extra

LOOKED_FOR = "<split>-00000-of-00001.parquet"
_NAME = re.compile(
    r"(?P<split>[A-Za-z0-9_]+)(-(?P<part>\d{5})-of-(?P<parts>\d{5}))?\.parquet", re.ASCII
)
_COLUMNS = ("answer", "bbox", "file_name")
# Rows read at once, without their images.
_BATCH = 1024
_MAX_SHOWN = 500


def find(root: Path, known: KnownSet | None) -> list[StoredSet]:
    """The data sets of this layout in a folder and ``data``; a known one also by its names."""
    if known is not None and not known.is_default:
        return []
    folders = [root, root / "data"]
    if known is not None:
        own = [root / name / below for name in known.folders for below in ("data", "")]
        folders = (folders if may_be_in(root, known) else []) + own
    found = []
    for folder in folders:
        by_split: dict[str, list[Path]] = {}
        for match, file in matching_files(folder, _NAME):
            by_split.setdefault(match["split"], []).append(file)
        if by_split:
            found.append(_stored(known.name if known else name_after(folder), by_split))
    return found


def _stored(name: str, by_split: Mapping[str, Sequence[Path]]) -> StoredSet:
    def read(split: str) -> Iterator[Annotation]:
        """One annotation for each answer of each row."""
        require_extra("refcoco", "reading parquet files")
        _check_complete(split, by_split[split])
        number = 0
        for file in by_split[split]:
            for row_of_file, row in enumerate(_rows(file)):
                image = row.file_name("file_name")
                for place, expression in enumerate(row.texts("answer")):
                    yield Annotation(
                        id=f"{split}-{number}-{place}",
                        image_id=image_of(image),
                        image=ImageSource(parquet=(file, row_of_file), frame="raw"),
                        image_name=image,
                        expression=expression,
                        box=row.box("bbox"),
                        image_size=None,
                        kind=None,
                        split=split,
                    )
                number += 1

    return StoredSet(
        name=name,
        layout="parquet",
        files=tuple(file for files in by_split.values() for file in files),
        # The images are in the files.
        looked_in="the parquet files",
        splits=lambda: tuple(by_split),
        read=read,
    )


def _check_complete(split: str, files: Sequence[Path]) -> None:
    """Refuse a split of which files are missing: its accuracy would be that of another set.

    Raises:
        UsageError: files are missing, or of two sets.
    """
    found = [_NAME.fullmatch(file.name) for file in files]
    numbers = [(int(name["part"] or 0), int(name["parts"] or 1)) for name in found if name]
    out_of = numbers[0][1]
    if numbers != [(n, out_of) for n in range(out_of)]:
        raise UsageError(
            f"the files of split {split} are not complete",
            seen=", ".join(file.name for file in files[:10]),
            allowed=f"all {out_of} of {out_of}",
            fix="download those that are missing",
        )


def _rows(file: Path) -> Iterator[Row]:
    """The rows of a file without their images.

    Raises:
        UsageError: not parquet, damaged, or without the columns.
    """
    with reading(file), open_parquet(file) as opened:
        names = opened.schema_arrow.names
        missing = [name for name in (IMAGE, *_COLUMNS) if name not in names]
        if missing or not has_images(opened):
            lacks = ", ".join(missing) or f"bytes in {IMAGE}"
            raise UsageError(
                "a parquet file has not got the columns",
                seen=f"{file}: no {lacks}; it has {', '.join(names)}"[:_MAX_SHOWN],
                allowed=f"{', '.join((IMAGE, *_COLUMNS))}; {IMAGE} of {{bytes, path}}",
            )
        number = 0
        for batch in opened.iter_batches(batch_size=_BATCH, columns=list(_COLUMNS)):
            for plain in batch.to_pylist():
                yield Row.of(plain, f"{file}, row {number}")
                number += 1
