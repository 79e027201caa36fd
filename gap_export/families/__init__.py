"""Families of models. A new one is a file and a line here; nothing else names a family."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from gap_export.errors import RecipeError, UnsupportedPrunerError, UsageError
from gap_export.families.llava import LlavaFamily
from gap_export.families.reference import Component, Device, Family, Reference
from gap_export.manifest import PruningSpec
from gap_export.positions import PositionMode, num_kept_tokens
from gap_export.pruning import PRUNERS, Order, find_pruner
from gap_export.recipe import Recipe

__all__ = [
    "FAMILIES",
    "MAX_SEED",
    "Component",
    "Device",
    "Family",
    "Reference",
    "build_reference",
    "find_family",
    "resolve_pruning",
    "supported_pruners",
]

# What a signed 64-bit integer holds, in JSON readers of other languages too.
MAX_SEED = 2**63 - 1

FAMILIES: Mapping[str, Family] = MappingProxyType({f.name: f for f in (LlavaFamily(),)})


def find_family(recipe: Recipe) -> Family:
    """The family a recipe names.

    Raises:
        RecipeError: there is none of that name.
    """
    if recipe.family not in FAMILIES:
        raise RecipeError(
            f"recipe {recipe.name} names an unknown family",
            seen=recipe.family,
            allowed=", ".join(FAMILIES),
        )
    return FAMILIES[recipe.family]


def supported_pruners(recipe: Recipe) -> tuple[str, ...]:
    """Names of the pruners this model can serve."""
    readings = find_family(recipe).readings(recipe)
    return tuple(name for name, pruner in PRUNERS.items() if pruner.reads <= readings)


def resolve_pruning(
    recipe: Recipe,
    *,
    pruner: str | None,
    keep_ratio: float | None,
    order: Order,
    positions: PositionMode,
    seed: int,
) -> PruningSpec:
    """Check a pruning request against a model and settle its numbers.

    Args:
        recipe: What the model is.
        pruner: Its name; None for the recipe's default.
        keep_ratio: In (0, 1]; None for the recipe's default.
        order: In which order kept tokens are fed.
        positions: Which ids they get.
        seed: Of the pruners that draw.

    Raises:
        UsageError: no such pruner, a keep ratio outside (0, 1], a seed outside 0..2**63 - 1, or an
            order the pruner has not got.
        UnsupportedPrunerError: the model lacks what the pruner reads.
        RecipeError: the recipe's default pruner does not exist, or does not fit its model.
    """
    if pruner is None:
        pruner = _default_pruner(recipe)
    keep_ratio = recipe.defaults.keep_ratio if keep_ratio is None else keep_ratio
    chosen = find_pruner(pruner)
    lacking = chosen.reads - find_family(recipe).readings(recipe)
    if lacking:
        raise UnsupportedPrunerError(
            f"model {recipe.name} cannot serve pruner {pruner}, it lacks",
            seen=", ".join(sorted(lacking)),
            allowed=", ".join(supported_pruners(recipe)),
        )
    if order not in chosen.orders:
        raise UsageError(
            f"pruner {pruner} cannot emit that order",
            seen=order,
            allowed=", ".join(chosen.orders),
        )
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise UsageError("seed out of range", seen=reprlib.repr(seed), allowed=f"0..{MAX_SEED}")
    num_visual = recipe.grid.num_visual_tokens
    num_kept = num_kept_tokens(keep_ratio, num_visual)
    sign = recipe.text_tower.similarity_sign if recipe.text_tower is not None else None
    return PruningSpec(
        pruner=pruner,
        order=order,
        extra_token="none",
        positions=positions,
        keep_ratio=keep_ratio,
        seed=seed if chosen.uses_seed else None,
        num_visual_tokens=num_visual,
        num_kept_tokens=num_kept,
        num_emitted_tokens=num_kept,
        text_similarity_sign=sign if "text" in chosen.reads else None,
    )


def _default_pruner(recipe: Recipe) -> str:
    """The pruner a recipe names, which its writer and not the user got wrong if it will not do."""
    name, usable = recipe.defaults.pruner, supported_pruners(recipe)
    if name not in usable:
        raise RecipeError(
            f"recipe {recipe.name}: defaults.pruner is not one its model can serve",
            seen=reprlib.repr(name),
            allowed=", ".join(usable),
            fix="correct the recipe, or name a pruner: --pruner",
        )
    return name


def build_reference(
    recipe: Recipe, checkpoint: Path, pruning: PruningSpec, *, device: Device
) -> Reference:
    """Build the pruned PyTorch modules of a model.

    Args:
        recipe: What the model is.
        checkpoint: Its folder of config.json and safetensors.
        pruning: From :func:`resolve_pruning`.
        device: ``meta``: for tracing, no weight is read; ``cpu``: for running.

    Raises:
        CheckpointError: the folder is missing or empty, of another architecture, damaged, or its
            tensors do not match the model exactly.
        RecipeError: the recipe names an unknown family.
    """
    return find_family(recipe).build(recipe, checkpoint, pruning, device=device)
