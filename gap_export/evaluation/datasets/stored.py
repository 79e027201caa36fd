"""What the layouts have in common: data sets found in folders, and the known ones' names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gap_export.evaluation.datasets.annotations import Annotation
from gap_export.evaluation.questions import ImageSource


@dataclass(frozen=True, kw_only=True)
class KnownSet:
    """A published data set.

    Attributes:
        name: As a user gives it.
        folders: What its folder is called; the first is that of the refer repository, and what its
            per-split files begin with.
        split_by: Whose splits, as in ``refs(unc).p``.
        is_default: Whether these are the splits that papers report.
    """

    name: str
    folders: tuple[str, ...]
    split_by: str
    is_default: bool = True


_REFCOCO = ("refcoco", "RefCOCO")
_REFCOCO_PLUS = ("refcoco+", "RefCOCOplus", "RefCOCO+")
_REFCOCOG = ("refcocog", "RefCOCOg")

# Google's splits share images between training and validation; few papers report them.
KNOWN_SETS: Mapping[str, KnownSet] = {
    known.name: known
    for known in (
        KnownSet(name="refcoco", folders=_REFCOCO, split_by="unc"),
        KnownSet(name="refcoco+", folders=_REFCOCO_PLUS, split_by="unc"),
        KnownSet(name="refcocog", folders=_REFCOCOG, split_by="umd"),
        KnownSet(name="refcoco-google", folders=_REFCOCO, split_by="google", is_default=False),
        KnownSet(name="refcocog-google", folders=_REFCOCOG, split_by="google", is_default=False),
    )
}


@dataclass(frozen=True, kw_only=True)
class StoredSet:
    """A data set found in a folder. Only its place is read before it is asked for.

    Attributes:
        files: Those that make it this data set.
        looked_in: Where its images are looked for.
        splits: Gives the splits it has.
        read: Gives the annotations of one of them, in the order of its files.

    Both functions raise a ``UsageError`` where the files cannot be used.
    """

    name: str
    layout: str
    files: tuple[Path, ...]
    looked_in: str
    splits: Callable[[], tuple[str, ...]]
    read: Callable[[str], Iterator[Annotation]]


class Images:
    """Finds the images of COCO below a folder.

    Args:
        root: The data set's folder.
    """

    # Where users keep train2014, below ROOT and ROOT/data; ROOT itself is the last.
    FOLDERS = (
        "train2014",
        "images/mscoco/images/train2014",
        "images/train2014",
        "coco/train2014",
        "coco/images/train2014",
        "coco2014/train2014",
        "mscoco/train2014",
        "mscoco/images/train2014",
        "images",
        "",
    )

    def __init__(self, root: Path) -> None:
        places = [root / base / folder for folder in self.FOLDERS for base in ("", "data")]
        self._there = [place for place in places if place.is_dir()]
        names = ", ".join(name for name in self.FOLDERS if name)
        self.looked_in = f"{root} and {root / 'data'}, or there in {names}"

    def find(self, name: str) -> ImageSource | None:
        """An image by its name, which may have folders in it; None where it is missing."""
        for place in self._there:
            if is_file(place / name):
                # COCO annotates images as they are stored.
                return ImageSource(path=place / name, frame="raw")
        return None


# COCO_train2014_000000580957_4.jpg is object 4 of the image COCO_train2014_000000580957.jpg.
_COCO_NAME = re.compile(r"(?P<image>COCO_[A-Za-z0-9]+_\d{12})(_\d+)?(\.jpg)?", re.ASCII)


def image_of(name: str) -> str:
    """The name of an image of COCO, from that of an object in it; other names are left alone."""
    found = _COCO_NAME.fullmatch(name)
    return found["image"] if found else name


def is_file(path: Path) -> bool:
    """Whether a file is there and can be looked at; no name makes this fail."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def matching_files(folder: Path, name: re.Pattern[str]) -> Iterator[tuple[re.Match[str], Path]]:
    """The files directly in a folder whose whole name matches, in the order of their names."""
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        match = name.fullmatch(file.name)
        if match is not None and is_file(file):
            yield match, file


def may_be_in(folder: Path, known: KnownSet) -> bool:
    """Whether a folder's own files may be of a data set: not where it is named after another."""
    others = {name for one in KNOWN_SETS.values() for name in one.folders} - set(known.folders)
    return folder.resolve().name not in others


def name_after(folder: Path, split_by: str | None = None) -> str:
    """What a data set is called that was found by its folder: a known name, or the folder's."""
    own = folder.resolve().name
    if own == "data":
        own = folder.resolve().parent.name
    alike = [known for known in KNOWN_SETS.values() if own in known.folders]
    for known in alike:
        if known.split_by == split_by or (split_by is None and known.is_default):
            return known.name
    return own if split_by is None else f"{own}-{split_by}"
