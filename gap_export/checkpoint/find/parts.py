"""The parts of a checkpoint on this machine: how they are named, and whether all are there."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from gap_export.checkpoint.find.hub_cache import look_for
from gap_export.errors import CheckpointError, UsageError
from gap_export.spec.recipe import RECIPE_NAME, Recipe

MAIN = "main"
NO_PARTS: Mapping[str, Path] = MappingProxyType({})
_MAX_SHOWN = 300
_ROLE = re.compile(r"(?P<role>\w+)=(?P<path>.*)", re.ASCII | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model's weights on this machine.

    Attributes:
        parts: A folder or a file for each role; optional parts may be missing.
        random_seed: Instead of any part: weights drawn from this seed.
    """

    parts: Mapping[str, Path]
    random_seed: int | None = None

    @classmethod
    def of(cls, place: Path) -> Checkpoint:
        """A checkpoint that is one folder, or one file."""
        return cls(parts={MAIN: place})

    @property
    def main(self) -> Path:
        """The part that every checkpoint has."""
        return self.parts[MAIN]

    def part(self, role: str, recipe: Recipe) -> Path:
        """The part of a role.

        Raises:
            CheckpointError: it is not there; the message says how to get it and how to name it.
        """
        if role in self.parts:
            return self.parts[role]
        search = look_for(role, recipe.checkpoint.parts)
        what = role if search.part is None else search.part.what
        raise CheckpointError(
            f"{recipe.name} needs {what}, which was not found",
            seen=None if search.part is None else f"looked for {search.where_looked()}",
            fix=search.how_to_get(),
        )


def parse_parts(values: Sequence[str]) -> dict[str, Path]:
    """Read ``--checkpoint [ROLE=]PATH``, which may be given any number of times.

    A word and ``=`` in front are a role, whether or not a recipe has it: a path of that form is
    written ``main=PATH`` or ``./PATH``. Without a role it is the main part.

    Raises:
        UsageError: no path, or two for one role.
    """
    parts: dict[str, Path] = {}
    for value in values:
        found = _ROLE.fullmatch(value)
        role, text = (found["role"], found["path"]) if found else (MAIN, value)
        if not text.strip() or "\0" in text:
            raise UsageError(
                "--checkpoint names no path", seen=reprlib.repr(value), allowed="[ROLE=]PATH"
            )
        if role in parts:
            raise UsageError(
                f"--checkpoint names the part {role} twice",
                seen=f"{parts[role]} and {text}"[:_MAX_SHOWN],
                fix="name other parts with their role: --checkpoint ROLE=PATH",
            )
        parts[role] = expand_home(text)
    return parts


def check_roles(given: Iterable[str], known: Iterable[str], what: str) -> None:
    """See that each role is one of those there are.

    Raises:
        UsageError: some are not.
    """
    known = tuple(known)
    unknown = [role for role in given if role not in known]
    if unknown:
        raise UsageError(
            f"{what} has no such part",
            seen=", ".join(unknown)[:_MAX_SHOWN],
            allowed=", ".join(known),
            fix="a path that begins with a word and '=' is written main=PATH",
        )


def check_named_parts(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """See that each part that was named exists, and is what it must be: a file, or a folder.

    Whether the main part is a file or a folder is left to its reader: what was named
    there may be a checkpoint of another family.

    Raises:
        CheckpointError: a part is not there.
        UsageError: a part that the recipe does not know.
    """
    declared = recipe.checkpoint.parts
    check_roles(checkpoint.parts, declared or (MAIN,), f"recipe {recipe.name}")
    for role, path in checkpoint.parts.items():
        part = declared.get(role)
        file = part.file if part is not None else None
        wrong_kind = file is not None and role != MAIN and path.is_dir()
        if not exists(path) or wrong_kind:
            raise CheckpointError(
                f"the part {role} of the checkpoint is not there",
                seen=str(path / file if wrong_kind and file is not None else path)[:_MAX_SHOWN],
                fix=look_for(role, declared).how_to_get(),
            )
        if path.is_file() and file is None and role != MAIN:
            raise CheckpointError(
                f"the part {role} of the checkpoint must be a folder",
                seen=f"{path} is a file",
                fix="name the folder that it lies in",
            )


def check_required_parts(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """See that every required part is there.

    Raises:
        CheckpointError: parts are missing; the message names all of them.
    """
    declared = recipe.checkpoint.parts
    if not declared:
        return
    # Named by the user, the main part may be whole; if it is not, its reader says what it lacks.
    own = MAIN in checkpoint.parts and checkpoint.main != look_for(MAIN, declared).place
    absent = {r: p for r, p in declared.items() if p.required and r not in checkpoint.parts}
    if all(part.required == "published" and own for part in absent.values()):
        return
    merged = f"; not needed where {MAIN} is merged with it" if own else ""
    lines = []
    for role, part in absent.items():
        search = look_for(role, declared)
        what = part.what + (merged if part.required == "published" else "")
        lines.append(f"{role}: {what}; looked for {search.where_looked()}; {search.how_to_get()}")
    raise CheckpointError(
        f"weights of {recipe.name} are not on this machine",
        seen=", ".join(absent),
        fix="nothing is downloaded by itself. " + " -- ".join(lines),
    )


def expand_home(path: str) -> Path:
    """A path as the user wrote it, with ``~`` for a home folder.

    Raises:
        CheckpointError: the home folder of that user is not known.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as err:
        raise CheckpointError(
            "the home folder of that user is not known",
            seen=reprlib.repr(path),
            fix="write the path out in full",
        ) from err


def exists(path: Path) -> bool:
    """Whether there is such a thing; a name no file system can hold is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def recipe_file(place: Path) -> Path:
    """Where a main part's own recipe is: in its folder, or beside it where it is a file."""
    return (place.parent if place.is_file() else place) / RECIPE_NAME
