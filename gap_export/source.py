"""Where a model's weights are: what a MODEL argument means, and where a bundle came from."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

from gap_export.errors import CheckpointError, UnknownModelError, UsageError
from gap_export.hub_cache import find_part, how_to_get, where_looked
from gap_export.manifest import Manifest, SourcePart
from gap_export.recipe import (
    HUB_ID,
    RECIPE_NAME,
    CheckpointPart,
    HubRepository,
    Recipe,
    find_recipe,
    list_recipes,
    load_recipe,
)

MAIN = "main"
_MAX_SHOWN = 300
_NO_PARTS: Mapping[str, Path] = MappingProxyType({})
_ROLE = re.compile(r"(?P<role>\w+)=(?P<path>.*)", re.ASCII | re.DOTALL)
# What MODEL may be; a folder that is one of a recipe's parts need not be a checkpoint by itself.
_ALLOWED = "a folder with config.json and weights, or a name of: gap-export models"


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
    def of(cls, folder: Path) -> Checkpoint:
        """A checkpoint that is one folder."""
        return cls(parts={MAIN: folder})

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
        declared = recipe.checkpoint.parts.get(role)
        what = declared.what if declared is not None else role
        raise CheckpointError(
            f"{recipe.name} needs {what}, which was not found",
            seen="looked for " + where_looked(declared) if declared is not None else None,
            fix=how_to_get(role, declared),
        )


def parse_parts(values: Sequence[str]) -> dict[str, Path]:
    """What ``--checkpoint [ROLE=]PATH``, given any number of times, means.

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
        parts[role] = _expand_home(text)
    return parts


def check_parts(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """See that each part that was named exists, and that every required one was.

    Raises:
        CheckpointError: a part is missing.
        UsageError: a part that the recipe does not know.
    """
    declared = recipe.checkpoint.parts
    _check_roles(checkpoint.parts, declared or (MAIN,), f"recipe {recipe.name}")
    _check_parts(recipe.name, declared, checkpoint)


def resolve_model(
    model: str,
    *,
    recipe: str | None = None,
    parts: Mapping[str, Path] = _NO_PARTS,
    random_seed: int | None = None,
) -> tuple[Recipe, Checkpoint]:
    """The recipe and the checkpoint that a MODEL argument means.

    MODEL is, in this order: the name or an alias of a recipe; a path, always so if it is absolute
    or begins with ``.`` or ``~``; a hub id, which stands for what the hub's cache holds of it. A
    caller that holds a folder passes ``str(folder.resolve())``: a :class:`Path` forgets its ``./``.

    Args:
        model: See above.
        recipe: Which recipe a folder or a hub id follows. A folder may have a recipe.yaml of its
            own; a hub id that a recipe names needs none.
        parts: By role; those not named are looked for in the caches of the hub and of torch.
        random_seed: Take no checkpoint; the weights are drawn.

    Raises:
        UnknownModelError: neither a recipe, nor a path, nor a hub id that a recipe names.
        CheckpointError: weights are not there, or a folder without recipe.yaml and no recipe named.
        UsageError: a role that the recipe has not got, or a part named twice.
    """
    found, main = _find_model(model, recipe, main_is_named=MAIN in parts)
    if random_seed is not None:
        if parts:
            raise UsageError(
                "random weights need no checkpoint",
                seen=", ".join(parts),
                fix="leave out one of the two",
            )
        return found, Checkpoint(parts={}, random_seed=random_seed)
    declared = dict(found.checkpoint.parts)
    _check_roles(parts, declared or (MAIN,), f"recipe {found.name}")
    if main is not None and MAIN in parts:
        raise UsageError(
            "the main part of the checkpoint is named twice",
            seen=f"{model} and {parts[MAIN]}"[:_MAX_SHOWN],
            fix="leave out --checkpoint, or give MODEL as a recipe's name",
        )
    if isinstance(main, HubRepository):
        declared[MAIN] = _narrowed(declared, main)
    elif main is not None:
        parts = {MAIN: main, **parts}
    here = {role: _settle(path, declared.get(role)) for role, path in parts.items()}
    for role, part in declared.items():
        place = find_part(part) if role not in here else None
        if place is not None:
            here[role] = place
    checkpoint = Checkpoint(parts=here)
    _check_parts(found.name, declared, checkpoint)
    return found, checkpoint


def resolve_source(
    manifest: Manifest, parts: Mapping[str, Path] = _NO_PARTS
) -> tuple[Recipe, Checkpoint]:
    """The recipe and the checkpoint a bundle was made from, proved by the hashes of its files.

    Args:
        manifest: The bundle's.
        parts: Where to look, by role. Others are looked for where the manifest says they were, in
            the caches, and, for a bundled model, in this installation.

    Raises:
        CheckpointError: not there, or its files are not the ones the bundle was made from.
        UnknownModelError: the main part has no recipe.yaml and no shipped recipe has the name.
        UsageError: a part that the bundle was not made from.
    """
    source = manifest.source
    if source.random_seed is None:
        _check_roles(parts, [part.role for part in source.parts], "the bundle's checkpoint")
    elif parts:
        raise UsageError(
            "the bundle's weights are random, no checkpoint goes with it", fix="leave it out"
        )
    shipped = _shipped(manifest.model.name)
    here: dict[str, Path] = {}
    for part in source.parts:
        declared = shipped[0].checkpoint.parts.get(part.role) if shipped is not None else None
        named = parts.get(part.role)
        places = [named] if named is not None else _places(part, declared, shipped)
        here[part.role] = _verified(part, places, declared)
    checkpoint = Checkpoint(parts=here, random_seed=source.random_seed)
    if MAIN in here and (here[MAIN] / RECIPE_NAME).is_file():
        return load_recipe(here[MAIN] / RECIPE_NAME), checkpoint
    return find_recipe(manifest.model.name)[0], checkpoint


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _find_model(
    model: str, recipe: str | None, *, main_is_named: bool
) -> tuple[Recipe, Path | HubRepository | None]:
    """The recipe, and the main part as far as MODEL says where it is.

    Weights that come with a recipe give way to those that the user names.
    """
    if not model.strip() or "\0" in model:
        raise UnknownModelError(
            "no model is named so",
            seen=reprlib.repr(model),
            allowed="a name of: gap-export models, a hub id of one, or a checkpoint folder",
        )
    is_path = Path(model).is_absolute() or model.startswith((".", "~"))
    if not is_path and recipe is None:
        try:
            found, home = find_recipe(model)
        except UnknownModelError:
            published = _published_as(model)
            if not _exists(Path(model)):
                if published is None:
                    raise
                return published
        else:
            bundled = found.checkpoint.kind == "bundled" and not main_is_named
            return found, home if bundled else None
    place = _expand_home(model)
    if not _exists(place):
        if recipe is not None and not is_path and re.fullmatch(HUB_ID, model):
            return find_recipe(recipe)[0], HubRepository(id=model)
        raise CheckpointError(
            "checkpoint not found", seen=str(place)[:_MAX_SHOWN], allowed=_ALLOWED
        )
    if recipe is not None:
        return find_recipe(recipe)[0], place
    if (place / RECIPE_NAME).is_file():
        return load_recipe(place / RECIPE_NAME), place
    raise CheckpointError(
        f"the checkpoint has no {RECIPE_NAME}",
        seen=place,
        fix="say which recipe it follows: --recipe NAME (names: gap-export models)",
    )


def _published_as(hub_id: str) -> tuple[Recipe, HubRepository] | None:
    """The recipe whose main part has that hub id."""
    for recipe, _ in list_recipes():
        main = recipe.checkpoint.parts.get(MAIN)
        for repository in main.repositories if main is not None else ():
            if repository.id == hub_id:
                return recipe, repository
    return None


def _narrowed(declared: Mapping[str, CheckpointPart], repository: HubRepository) -> CheckpointPart:
    """The main part from one repository and no other."""
    part = declared.get(MAIN) or CheckpointPart(what="weights")
    return part.model_copy(update={"hub": repository, "also": (), "url": None})


def _check_parts(name: str, declared: Mapping[str, CheckpointPart], checkpoint: Checkpoint) -> None:
    for role, path in checkpoint.parts.items():
        part = declared.get(role)
        if not _exists(path):
            raise CheckpointError(
                f"the part {role} of the checkpoint is not there",
                seen=str(path)[:_MAX_SHOWN],
                fix=how_to_get(role, part),
            )
        if path.is_file() and (part is None or part.file is None):
            raise CheckpointError(
                f"the part {role} of the checkpoint must be a folder",
                seen=f"{path} is a file",
                fix="name the folder that it lies in",
            )
    if not declared:
        return
    # Named by the user, the main part may be whole; if it is not, its reader says what it lacks.
    own = MAIN in checkpoint.parts and checkpoint.main != find_part(declared[MAIN])
    needed = {r: p for r, p in declared.items() if p.required is True or (p.required and not own)}
    missing = {role: part for role, part in needed.items() if role not in checkpoint.parts}
    if missing:
        raise _missing_parts(name, missing)


def _missing_parts(name: str, missing: Mapping[str, CheckpointPart]) -> CheckpointError:
    lines = [
        f"\n  {role}: {part.what}; looked for {where_looked(part)}; {how_to_get(role, part)}"
        for role, part in missing.items()
    ]
    return CheckpointError(
        f"weights of {name} are not on this machine",
        seen=", ".join(missing),
        fix="nothing is downloaded by itself:" + "".join(lines),
    )


def _check_roles(given: Iterable[str], known: Iterable[str], what: str) -> None:
    unknown = [role for role in given if role not in known]
    if unknown:
        raise UsageError(
            f"{what} has no such part",
            seen=", ".join(unknown)[:_MAX_SHOWN],
            allowed=", ".join(known),
            fix="a path that begins with a word and '=' is written main=PATH",
        )


def _settle(path: Path, part: CheckpointPart | None) -> Path:
    """The file itself where a part is a file and its folder was named."""
    if part is not None and part.file is not None and path.is_dir():
        return path / part.file
    return path


def _shipped(name: str) -> tuple[Recipe, Path] | None:
    try:
        return find_recipe(name)
    except UnknownModelError:
        return None


def _places(
    part: SourcePart, declared: CheckpointPart | None, shipped: tuple[Recipe, Path] | None
) -> list[Path]:
    """Where a part of a bundle's source may be."""
    places = [Path(part.location)]
    if shipped is not None and shipped[0].checkpoint.kind == "bundled" and part.role == MAIN:
        places.append(shipped[1])
    cached = find_part(declared) if declared is not None else None
    return places if cached is None else [*places, cached]


def _verified(part: SourcePart, places: Sequence[Path], declared: CheckpointPart | None) -> Path:
    """The first of some places that is there, if it is what the manifest says."""
    place = next((place for place in places if _exists(place)), None)
    flag = f"--checkpoint {part.role}=PATH"
    if place is None:
        raise CheckpointError(
            f"the checkpoint this bundle was made from is not here ({part.role})",
            seen=", ".join(dict.fromkeys(map(str, places)))[:_MAX_SHOWN],
            fix=f"say where it is: {flag}",
        )
    is_file = declared is not None and declared.file is not None and len(part.files) == 1
    if is_file and place.is_dir():
        place = place / part.files[0].path
    for file in part.files:
        # A file may have been given another name: its bytes say what it is.
        path = place / file.path if place.is_dir() else place
        if not path.is_file() or path.stat().st_size != file.size or hash_file(path) != file.sha256:
            raise CheckpointError(
                "this is not the checkpoint the bundle was made from",
                seen=f"{path} is missing or differs",
                allowed=f"sha256 {file.sha256}",
                fix=f"give the right one with {flag}, or export the bundle again",
            )
    return place


def _expand_home(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as err:
        raise CheckpointError(
            "the home folder of that user is not known",
            seen=reprlib.repr(path),
            fix="write the path out in full",
        ) from err


def _exists(path: Path) -> bool:
    """Whether there is such a thing; a name no file system can hold is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
