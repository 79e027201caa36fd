"""Where a model's weights are: what a MODEL argument means."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from pathlib import Path

from gap_export.checkpoint.find.foreign import describe_config, refuse_foreign
from gap_export.checkpoint.find.hub_cache import look_for
from gap_export.checkpoint.find.parts import (
    MAIN,
    NO_PARTS,
    Checkpoint,
    check_named_parts,
    check_required_parts,
    check_roles,
    exists,
    expand_home,
    parse_parts,
    recipe_file,
)
from gap_export.errors import CheckpointError, UnknownModelError, UsageError
from gap_export.spec.manifest import MANIFEST_NAME
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
]

_MAX_SHOWN = 300
# What MODEL may be; a folder that is one of a recipe's parts need not be a checkpoint by itself.
_ALLOWED = "a folder with config.json and weights, or a name of: gap-export models"


def resolve_model(
    model: str,
    *,
    recipe: str | None = None,
    parts: Mapping[str, Path] = NO_PARTS,
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
    if recipe_file(place).is_file():
        return load_recipe(recipe_file(place)), place
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
