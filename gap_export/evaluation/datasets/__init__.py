"""Data sets to evaluate on, by their name.

========================  =========================================================================
``refshapes[:SPLIT]``     drawn here: ``heldout`` (the default) or ``train``
``refshapes-2[:SPLIT]``   the same of harder scenes, see ``refshapes2``
``NAME:ROOT[:SPLITS]``    a published one in the folder ROOT. NAME: ``refcoco``, ``refcoco+``,
                          ``refcocog`` (of its two sets of splits UMD's, whose splits share no
                          image), ``refcoco-google``, ``refcocog-google``
``FOLDER[:SPLITS]``       what is in the folder
========================  =========================================================================

SPLITS is one, or several with commas; it can be left out where there is only one. ``./refshapes``
is a folder. The layout of a folder is recognized by its files: see ``refer``, ``per_split``,
``parquet`` and ``own``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from gap_export.errors import UsageError
from gap_export.evaluation.datasets import own, parquet, per_split, refer
from gap_export.evaluation.datasets.annotations import assemble, check_box
from gap_export.evaluation.datasets.refshapes_set import MAX_ABSENT_SHARE, open_drawn
from gap_export.evaluation.datasets.stored import KNOWN_SETS, KnownSet, StoredSet
from gap_export.evaluation.drawn import GENERATORS, drawn_name
from gap_export.evaluation.questions import Dataset

__all__ = ["check_box", "open_dataset"]

_FINDERS: tuple[Callable[[Path, KnownSet | None], Sequence[StoredSet]], ...] = (
    refer.find,
    per_split.find,
    parquet.find,
    own.find,
)
_SPLITS = re.compile(r"[\w+-]+(,[\w+-]+)*", re.ASCII)
_MAX_SHOWN = 300
_ALLOWED = (
    f"{'|'.join(GENERATORS)}[:SPLIT], {'|'.join(KNOWN_SETS)}:ROOT[:SPLITS] or FOLDER[:SPLITS]"
)


def open_dataset(spec: str, *, samples: int | None, seed: int, absent: float = 0.0) -> Dataset:
    """Open a data set.

    Args:
        spec: Which; see above.
        samples: Ask the first so many expressions of each split, those that cannot be asked
            included; None for all.
        seed: Seed of the scenes of what is drawn; nothing else is drawn.
        absent: Of what is drawn: share of expressions whose object is not there, see
            ``refshapes_set``. Other data sets say themselves which those are.

    Raises:
        UsageError: no such data set, several, or a split that it has not got; its files cannot be
            used; none of its expressions can be asked.
        MissingDependencyError: it needs an extra that is not installed.
    """
    if samples is not None and samples < 1:
        raise UsageError("too few samples", seen=samples, allowed=">= 1")
    if not 0 <= absent <= MAX_ABSENT_SHARE:
        raise UsageError(
            "no such share of absent objects", seen=absent, allowed=f"0 to {MAX_ABSENT_SHARE}"
        )
    name, _, rest = spec.partition(":")
    drawn = drawn_name(spec)
    if absent and drawn is None:
        raise UsageError(
            "which objects are not there is known of drawn scenes alone",
            seen=f"{absent:g} of {spec!r}",
            allowed=f"--absent with {' or '.join(GENERATORS)}; questions.jsonl has lines with a "
            "box of null",
        )
    if drawn is not None:
        return open_drawn(drawn, spec, rest or None, samples=samples, seed=seed, absent=absent)
    known = KNOWN_SETS.get(name)
    place, wanted = _place_and_splits(spec if known is None else rest)
    root = _check_folder(place, spec)
    stored = _find(root, known)
    splits = _choose_splits(stored, wanted)
    return assemble(
        (annotation for split in splits for annotation in stored.read(split)),
        spec=spec,
        name=stored.name,
        layout=stored.layout,
        splits=splits,
        samples=samples,
        looked_in=stored.looked_in,
    )


def _place_and_splits(text: str) -> tuple[str, str | None]:
    """Parts of ``FOLDER[:SPLITS]``, where the folder may have colons, as one of a drive has."""
    if _is_folder(text):
        return text, None
    place, colon, last = text.rpartition(":")
    # Users may give their own splits any name.
    is_split = _SPLITS.fullmatch(last) is not None or (bool(last) and _is_folder(place))
    return (place, last) if colon and is_split else (text, None)


def _is_folder(place: str) -> bool:
    try:
        return bool(place) and Path(place).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):
        # No name of a file; the message is for later.
        return False


def _check_folder(place: str, spec: str) -> Path:
    try:
        # A worker may be in another folder.
        root = Path(place).expanduser().absolute()
        if place and root.is_dir():
            return root
        what = "the data set is not a folder" if place and root.exists() else "no such data set"
    except (OSError, RuntimeError, ValueError) as err:
        # Without the name, which may be what is too long.
        reason = (isinstance(err, OSError) and err.strerror) or str(err)
        raise UsageError(
            "no such data set", seen=f"{spec[:_MAX_SHOWN]!r}: {reason}", allowed=_ALLOWED
        ) from err
    raise UsageError(
        what,
        seen=repr(spec),
        allowed=_ALLOWED,
        fix=f"there is no folder {place!r}" if place else "say which folder it is in",
    )


def _find(root: Path, known: KnownSet | None) -> StoredSet:
    """The one data set that is meant.

    Raises:
        UsageError: none, or several.
    """
    # In a folder, one that is below it under its own name is as good as one that is there.
    wanted = [known] if known is not None else [None, *KNOWN_SETS.values()]
    try:
        stored = [one for which in wanted for find in _FINDERS for one in find(root, which)]
    except OSError as err:
        raise UsageError("a folder cannot be read", seen=f"{root}: {err.strerror or err}") from err
    # Several names may lead to the same files: the first counts.
    by_files: dict[tuple[Path, ...], StoredSet] = {}
    for one in stored:
        by_files.setdefault(one.files, one)
    found = list(by_files.values())
    if len(found) == 1:
        return found[0]
    if found:
        names = [one.name for one in found if one.name in KNOWN_SETS]
        by_name = known is None and len(set(names)) > 1
        raise UsageError(
            "there are several data sets in this folder",
            seen="; ".join(
                f"{one.name} ({one.layout}: {one.files[0].relative_to(root)})" for one in found
            ),
            fix=f"name one, as in {names[0]}:{root}"
            if by_name
            else "give the folder of one of them, or move all but one away",
        )
    if known is None:
        looked_for = (refer.LOOKED_FOR, per_split.LOOKED_FOR, parquet.LOOKED_FOR, own.LOOKED_FOR)
        raise UsageError(
            "this folder holds no data set", seen=root, fix=f"looked for {', '.join(looked_for)}"
        )
    files = [f"refs({known.split_by}).p beside instances.json"]
    if known.is_default:
        files += [f"{known.folders[0]}_<split>.json", parquet.LOOKED_FOR]
    below = ", ".join(f"{name}/" for name in known.folders)
    raise UsageError(
        f"{known.name} is not in this folder",
        seen=root,
        fix=f"looked there, and below it in {below}, for {', '.join(files)}",
    )


def _choose_splits(stored: StoredSet, wanted: str | None) -> tuple[str, ...]:
    """The splits asked for, each once.

    Raises:
        UsageError: it has not got one, or has several and none was named.
    """
    there = stored.splits()
    if wanted is None:
        if len(there) > 1:
            raise UsageError(
                f"{stored.name} has several splits and none was named",
                allowed=", ".join(there),
                fix=f"put one at the end, or several: :{','.join(there[:2])}",
            )
        return there
    # A user's own split may have a comma in its name.
    chosen = (wanted,) if wanted in there else tuple(dict.fromkeys(wanted.split(",")))
    unknown = [split for split in chosen if split not in there]
    if unknown:
        raise UsageError(
            f"{stored.name} has no such split",
            seen=", ".join(split or "one without a name" for split in unknown),
            allowed=", ".join(there) or "it has none: it is empty",
        )
    return chosen
