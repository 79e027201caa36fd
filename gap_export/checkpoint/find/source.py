"""Where a model's weights are: what a MODEL argument means, and where a bundle came from."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gap_export.bundle.files import sha256_of
from gap_export.checkpoint.find.foreign import describe_config, refuse_foreign
from gap_export.checkpoint.find.hub_cache import ADAPTER_CONFIG, look_for
from gap_export.checkpoint.find.parts import (
    MAIN,
    Checkpoint,
    check_named_parts,
    check_required_parts,
    check_roles,
    exists,
    expand_home,
    parse_parts,
)
from gap_export.errors import CheckpointError, RecipeError, UnknownModelError, UsageError
from gap_export.spec.canvas import with_canvas, with_grids
from gap_export.spec.manifest import (
    MANIFEST_NAME,
    ImageSpec,
    Manifest,
    SourcePart,
    TilesSpec,
    differing_fields,
)
from gap_export.spec.recipe import (
    HUB_ID,
    RECIPE_NAME,
    CheckpointPart,
    HubRepository,
    Recipe,
    find_recipe,
    list_recipes,
    load_recipe,
)

__all__ = [
    "MAIN",
    "Checkpoint",
    "check_named_parts",
    "check_required_parts",
    "parse_parts",
    "resolve_model",
    "resolve_recipe",
    "resolve_source",
]

_MAX_SHOWN = 300
_NO_PARTS: Mapping[str, Path] = MappingProxyType({})
# What MODEL may be; a folder that is one of a recipe's parts need not be a checkpoint by itself.
_ALLOWED = "a folder with config.json and weights, or a name of: gap-export models"
# A manifest has these from the recipe, word for word.
_KEPT_FACTS = ("grid", "image", "prompt", "box")


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
        UsageError: a role that the recipe has not got, a part named twice, or MODEL is a bundle.
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
    check_roles(parts, found.checkpoint.parts or (MAIN,), f"recipe {found.name}")
    if main is not None and MAIN in parts:
        raise UsageError(
            "the main part of the checkpoint is named twice",
            seen=f"{model} and {parts[MAIN]}"[:_MAX_SHOWN],
            fix="leave out --checkpoint, or give MODEL as a recipe's name",
        )
    wanted = found
    if isinstance(main, HubRepository):
        wanted = _narrowed(found, main)
    elif main is not None:
        parts = {MAIN: main, **parts}
    declared = wanted.checkpoint.parts
    here = dict(parts)
    for role, part in declared.items():
        place = here.get(role) or look_for(role, declared).place
        if place is not None:
            # The file itself, where the folder that holds it was named.
            inside = place / part.file if part.file is not None else place
            here[role] = inside if exists(inside) else place
    checkpoint = Checkpoint(parts=here)
    check_named_parts(wanted, checkpoint)
    if MAIN not in parts:
        # Whether the user's own main part is what it must be comes before what goes with it:
        # families.read_source looks at it, and then for the rest.
        check_required_parts(wanted, checkpoint)
    return found, checkpoint


def resolve_source(
    manifest: Manifest, parts: Mapping[str, Path] = _NO_PARTS
) -> tuple[Recipe, Checkpoint]:
    """The recipe and the checkpoint a bundle was made from, proved by the hashes of its files.

    The recipe is the one of the bundle's model: a recipe.yaml of that name with the main part, else
    the shipped one.

    Args:
        manifest: The bundle's.
        parts: Where to look, by role. Those not named are looked for where the manifest says they
            were, in the caches, and, for a bundled model, in this installation.

    Raises:
        CheckpointError: not there, its files are not the ones the bundle was made from, or the
            recipe is no longer what it was.
        UnknownModelError: the recipe is nowhere.
        RecipeError: the recipe cannot be read.
        UsageError: a part that the bundle was not made from.
    """
    source = manifest.source
    if source.random_seed is None:
        check_roles(parts, [part.role for part in source.parts], "the bundle's checkpoint")
    elif parts:
        raise UsageError(
            "the bundle's weights are random, no checkpoint goes with it", fix="leave it out"
        )
    shipped = _shipped(manifest.model.name)
    main = next((part for part in source.parts if part.role == MAIN), None)
    homes = []
    if main is not None:
        # A main part that is not there is missed before its recipe is.
        homes = [_first_place(main, parts, None, shipped), Path(main.location)]
    recipe = resolve_recipe(manifest, homes)
    here = {
        part.role: _verified(part, _first_place(part, parts, recipe, shipped), recipe)
        for part in source.parts
    }
    return recipe, Checkpoint(parts=here, random_seed=source.random_seed)


def resolve_recipe(manifest: Manifest, homes: Sequence[Path]) -> Recipe:
    """The recipe that a bundle was made by, if it still says what the bundle says.

    Args:
        manifest: The bundle's.
        homes: Where a recipe.yaml of the model's name may be, before the shipped one.

    Raises:
        CheckpointError: it says something else.
        UnknownModelError: it is nowhere.
        RecipeError: it cannot be read.
    """
    name = manifest.model.name
    shipped = _shipped(name)
    for file in map(_recipe_file, homes):
        try:
            recipe = load_recipe(file) if file.is_file() else None
        except RecipeError:
            # Other tools write files of that name as well, into checkpoints of shipped recipes.
            if shipped is None:
                raise
            continue
        # A recipe.yaml of another name was not the one used.
        if recipe is not None and recipe.name == name:
            return _as_exported(manifest, recipe)
    if shipped is None:
        beside = f"a {RECIPE_NAME} of that name with the main part of the checkpoint"
        raise UnknownModelError(
            "the recipe that this bundle was exported by is not here",
            seen=name,
            allowed=beside if homes else "a name of: gap-export models",
            fix=f"put it there, or name a main part that has it: --checkpoint {MAIN}=PATH"
            if homes
            else None,
        )
    return _as_exported(manifest, shipped[0])


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
            if not exists(Path(model)):
                published = _published_as(model)
                if published is None:
                    raise
                return published
        else:
            bundled = found.checkpoint.kind == "bundled" and not main_is_named
            return found, home if bundled else None
    place = expand_home(model)
    if not exists(place):
        if recipe is not None and not is_path and re.fullmatch(HUB_ID, model):
            return find_recipe(recipe)[0], HubRepository(id=model)
        raise CheckpointError(
            "checkpoint not found", seen=str(place)[:_MAX_SHOWN], allowed=_ALLOWED
        )
    if (place / MANIFEST_NAME).is_file():
        raise UsageError(
            "this is a bundle, which is exported already, and no model",
            seen=str(place)[:_MAX_SHOWN],
            allowed=_ALLOWED,
            fix="what takes a bundle: gap-export check, ground, eval, inspect",
        )
    if recipe is not None:
        return find_recipe(recipe)[0], place
    if _recipe_file(place).is_file():
        return load_recipe(_recipe_file(place)), place
    refuse_foreign(place)
    kind = describe_config(place)
    raise CheckpointError(
        f"the checkpoint has no {RECIPE_NAME}",
        seen=place if kind is None else f"{place}, {kind}",
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


def _narrowed(recipe: Recipe, repository: HubRepository) -> Recipe:
    """The recipe, with the main part from one repository and no other."""
    parts = recipe.checkpoint.parts
    main = parts.get(MAIN) or CheckpointPart(what="weights")
    main = main.model_copy(update={"hub": repository, "also": (), "url": None})
    checkpoint = recipe.checkpoint.model_copy(update={"parts": {**parts, MAIN: main}})
    return recipe.model_copy(update={"checkpoint": checkpoint})


def _recipe_file(place: Path) -> Path:
    """Where a main part's own recipe is: in its folder, or beside it where it is a file."""
    return (place.parent if place.is_file() else place) / RECIPE_NAME


def _shipped(name: str) -> tuple[Recipe, Path] | None:
    try:
        return find_recipe(name)
    except UnknownModelError:
        return None


def _as_exported(manifest: Manifest, recipe: Recipe) -> Recipe:
    """A recipe on the canvas that was chosen for the bundle.

    Raises:
        CheckpointError: it says something else.
    """
    image, shapes = manifest.image, recipe.architecture
    # Whether its towers take another canvas, its family says, which refuses what they do not.
    may_differ = shapes is None or isinstance(shapes.vision.image_size, tuple)
    if may_differ and (image.height, image.width) != (recipe.image.height, recipe.image.width):
        with suppress(UsageError):
            recipe = with_canvas(recipe, image.height, image.width)
    if may_differ and image.grids != recipe.image.grids:
        recipe = with_grids(recipe, image.grids)
    _check_unchanged(manifest, recipe)
    return recipe


def _check_unchanged(manifest: Manifest, recipe: Recipe) -> None:
    """See that a recipe says what it said when the bundle was exported."""
    if manifest.prompt.question is None:
        # Made before recipes said where the question stands; nothing of it reads that.
        asked = replace(recipe.prompt, question=None)
        recipe = recipe.model_copy(update={"prompt": asked})
    changed = [
        f"{name}{path}: {seen} in the recipe, {held} in the bundle"
        for name in _KEPT_FACTS
        for path, seen, held in differing_fields(
            *(_but_for_tiles(getattr(owner, name)) for owner in (recipe, manifest))
        )
    ]
    if manifest.model.family != recipe.family:
        changed.insert(0, f"family: {recipe.family}, {manifest.model.family} in the bundle")
    if changed:
        raise CheckpointError(
            "the recipe changed since the bundle was exported, or the bundle is not of it",
            seen=f"{recipe.name}: {'; '.join(changed)}",
            fix="export the bundle again, or restore the recipe",
        )


def _but_for_tiles(fact: Any) -> Any:
    """A fact without the order of its tiles' sizes and whose code they follow.

    Those are the checkpoint's: published and converted ones differ in them. (Of tiles that are not
    joined to rows neither comes from a checkpoint.)
    """
    if not isinstance(fact, ImageSpec) or fact.tiles is None or not fact.has_newlines:
        return fact
    return replace(fact, tiles=TilesSpec(resolutions=tuple(sorted(fact.tiles.resolutions))))


def _first_place(
    part: SourcePart,
    named: Mapping[str, Path],
    recipe: Recipe | None,
    shipped: tuple[Recipe, Path] | None,
) -> Path:
    """The first place that is there of those where a part of a bundle's source may be.

    Args:
        part: Which.
        named: What the user says.
        recipe: The bundle's; None as long as it is not known, for the shipped one.
        shipped: The shipped recipe of the model's name.
    """
    if part.role in named:
        places = [named[part.role]]
    else:
        places = [Path(part.location)]
        if recipe is None and shipped is not None:
            recipe = shipped[0]
        if shipped is not None and shipped[0].checkpoint.kind == "bundled" and part.role == MAIN:
            places.append(shipped[1])
        declared = recipe.checkpoint.parts if recipe is not None else {}
        cached = look_for(part.role, declared).place
        places += [] if cached is None else [cached]
    place = next(filter(exists, places), None)
    if place is None:
        raise CheckpointError(
            f"the checkpoint this bundle was made from is not here ({part.role})",
            seen=", ".join(dict.fromkeys(map(str, places)))[:_MAX_SHOWN],
            fix=f"say where it is: --checkpoint {part.role}=PATH",
        )
    return place


def _verified(part: SourcePart, place: Path, recipe: Recipe) -> Path:
    """A place, or the file in it that is the part, if its files are those the manifest lists."""
    declared = recipe.checkpoint.parts.get(part.role)
    is_file = declared is not None and declared.file is not None and len(part.files) == 1
    if is_file and place.is_dir():
        place = place / part.files[0].path
    for file in part.files:
        # A file may have been given another name: its bytes say what it is.
        path = place / file.path if place.is_dir() else place
        if not path.is_file() or path.stat().st_size != file.size or sha256_of(path) != file.sha256:
            raise CheckpointError(
                "this is not the checkpoint the bundle was made from",
                seen=f"{path} is missing or differs",
                allowed=f"sha256 {file.sha256}",
                fix=f"give the right one with --checkpoint {part.role}=PATH, or export the bundle "
                "again",
            )
    if (place / ADAPTER_CONFIG).is_file() and ADAPTER_CONFIG not in {f.path for f in part.files}:
        raise CheckpointError(
            "the checkpoint has an adapter that the bundle was made without",
            seen=place / ADAPTER_CONFIG,
            fix="export the bundle again, or move the adapter away",
        )
    return place
