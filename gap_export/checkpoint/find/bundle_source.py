"""The recipe and the checkpoint that a bundle was made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from gap_export.bundle.files import sha256_of
from gap_export.checkpoint.find.hub_cache import ADAPTER_CONFIG, look_for
from gap_export.checkpoint.find.parts import (
    MAIN,
    NO_PARTS,
    Checkpoint,
    check_roles,
    exists,
    recipe_file,
)
from gap_export.errors import CheckpointError, RecipeError, UnknownModelError, UsageError
from gap_export.spec.canvas import with_canvas, with_grids
from gap_export.spec.manifest import (
    ImageSpec,
    Manifest,
    SourcePart,
    TilesSpec,
    differing_fields,
)
from gap_export.spec.recipe import RECIPE_NAME, Recipe, find_recipe, load_recipe

_MAX_SHOWN = 300
# A manifest has these from the recipe, word for word.
_KEPT_FACTS = ("grid", "image", "prompt", "box")


def resolve_source(
    manifest: Manifest, parts: Mapping[str, Path] = NO_PARTS
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
    for file in map(recipe_file, homes):
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
