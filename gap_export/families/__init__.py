"""Families of models. A new one is a folder and a name here; nothing else names a family.

Another package adds one by an entry point, see :mod:`gap_export.spec.family`.

Families are built on torch and transformers, whose imports take seconds. What is asked of a model
before anything is built (its pruners, what an option means for it) needs neither, so that a mistake
is reported at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gap_export.checkpoint.find.foreign import refuse_foreign
from gap_export.checkpoint.find.source import (
    MAIN,
    Checkpoint,
    check_named_parts,
    check_required_parts,
)
from gap_export.errors import CheckpointError, GapExportError, RecipeError
from gap_export.families.internvl import INTERNVL
from gap_export.families.llava import LLAVA, LLAVA_NEXT
from gap_export.families.minigpt_v2 import MINIGPT_V2
from gap_export.families.qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from gap_export.families.shikra import SHIKRA
from gap_export.plugins import load_object
from gap_export.progress import Progress
from gap_export.pruning.resolve import (
    MAX_RANKED_TOKENS,
    MAX_SEED,
    resolve_request,
    served_pruners,
)
from gap_export.spec.canvas import choose_canvas
from gap_export.spec.family import OTHER_FAMILIES, Family, other_families
from gap_export.spec.manifest import PruningSpec
from gap_export.spec.recipe import Recipe
from gap_export.spec.requests import PruningRequest

if TYPE_CHECKING:
    from gap_export.families.common.builder import ModelBuilder
    from gap_export.families.common.reference import Component, Device, ModelSource, Reference

__all__ = [
    "MAX_RANKED_TOKENS",
    "MAX_SEED",
    "Component",
    "Device",
    "Family",
    "Reference",
    "all_families",
    "broken_families",
    "build_reference",
    "find_family",
    "find_readings",
    "load_builder",
    "load_family",
    "native_protocol",
    "on_canvas",
    "read_source",
    "resolve_pruning",
    "supported_pruners",
]

# Files of a folder that no layout recognizes; each may be opened.
_MAX_FILES_TRIED = 16


# A new family of this package is a folder, and a name here.
_OURS = {
    family.name: family
    for family in (
        *(LLAVA, LLAVA_NEXT, SHIKRA, MINIGPT_V2),
        *(QWEN2_VL, QWEN2_5_VL, QWEN3_VL, INTERNVL),
    )
}
# Names of this package that are imported when they are taken.
_LATE = ("Component", "Device", "Reference")


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module("gap_export.families.common.reference"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def all_families() -> Mapping[str, Family]:
    """Our own, then those of other packages that can be used; see :func:`broken_families`."""
    return MappingProxyType({**{one.name: one for one in other_families()}, **_OURS})


def broken_families() -> Mapping[str, GapExportError]:
    """Those of other packages that cannot be used, and why."""
    return OTHER_FAMILIES.broken(_OURS)


def find_family(recipe: Recipe) -> Family:
    """The family a recipe names; no PyTorch is imported, and of other packages only its own.

    Raises:
        RecipeError: there is none of that name.
        GapExportError: it is another package's and cannot be used.
    """
    name = recipe.family
    if name in _OURS:
        return _OURS[name]
    if name in OTHER_FAMILIES.entries:
        return OTHER_FAMILIES.load(name)
    raise RecipeError(
        f"recipe {recipe.name} names an unknown family",
        seen=name,
        allowed=", ".join((*_OURS, *OTHER_FAMILIES.entries)),
        fix="correct the recipe, or install the package that brings the family",
    )


def load_builder(family: Family) -> ModelBuilder:
    """What reads a family's checkpoints and builds its models; imports PyTorch.

    Raises:
        GapExportError: another package's cannot be imported, or is none.
    """
    from gap_export.families.common.builder import ModelBuilder

    return load_object(family.builder, ModelBuilder, what=f"family {family.name}")


def load_family(recipe: Recipe, progress: Progress) -> None:
    """Import what builds a recipe's model beforehand, and say so where that takes seconds.

    Raises:
        RecipeError: there is no family of the name it gives.
    """
    if "torch" not in sys.modules:
        with progress.stage("loading PyTorch"):
            load_builder(find_family(recipe))


def find_readings(recipe: Recipe) -> frozenset[str]:
    """What a pruner may read from a recipe's model.

    Raises:
        RecipeError: there is no family of the name it gives.
    """
    layer, shapes = recipe.select_layer, recipe.architecture
    # Counted from the front it takes the sizes to know whether a layer lies behind it.
    has_next = layer < -1 or (shapes is not None and 0 <= layer < shapes.vision.num_layers)
    lacking = {
        name
        for name, is_there in (("text", recipe.text_tower is not None), ("next_layer", has_next))
        if not is_there
    }
    return find_family(recipe).readings - lacking


def native_protocol(family: str) -> str | None:
    """The evaluation protocol of a family's authors; None where they publish none.

    Args:
        family: Its name; of a bundle that another program made it may be unknown here.
    """
    found = all_families().get(family)
    return None if found is None else found.protocol


def supported_pruners(recipe: Recipe) -> tuple[str, ...]:
    """Names of the pruners this model can serve."""
    return served_pruners(find_readings(recipe))


def resolve_pruning(recipe: Recipe, request: PruningRequest) -> PruningSpec:
    """Check a pruning request against a model and settle its numbers.

    Raises:
        UsageError: see :func:`gap_export.pruning.resolve.resolve_request`.
    """
    return resolve_request(recipe, request, find_readings(recipe))


def on_canvas(recipe: Recipe, canvas: str | None) -> Recipe:
    """The recipe for images of another size, where its family takes any.

    Args:
        recipe: The model's own.
        canvas: ``WIDTHxHEIGHT`` in pixels; None leaves it as it is.

    Raises:
        UsageError: the model takes no such size.
        RecipeError: there is no family of the name it gives.
    """
    return choose_canvas(recipe, canvas, takes_any=find_family(recipe).any_canvas)


def build_reference(
    recipe: Recipe,
    checkpoint: Checkpoint,
    pruning: PruningSpec,
    *,
    device: Device,
    dtype: str | None = None,
) -> Reference:
    """Build the pruned PyTorch modules of a model.

    Args:
        recipe: What the model is.
        checkpoint: Its parts on this machine.
        pruning: From :func:`resolve_pruning`.
        device: ``meta``: for tracing, no weight is read; ``cpu``: for running.
        dtype: float32, float16 or bfloat16; None for the checkpoint's own.

    Raises:
        CheckpointError: a part is missing or empty, of another architecture, damaged, or its
            tensors do not match the model exactly.
        RecipeError: the recipe names an unknown family.
        UsageError: random weights of a recipe that does not say its sizes.
    """
    source = read_source(recipe, checkpoint)
    return load_builder(find_family(recipe)).build(
        recipe, source, checkpoint, pruning, dtype=dtype or source.dtype, device=device
    )


def read_source(recipe: Recipe, checkpoint: Checkpoint) -> ModelSource:
    """Read a checkpoint's headers and configs by whichever layout it is stored in.

    Raises:
        CheckpointError: none of the family's layouts, or not what the layout promises.
        RecipeError: the recipe names an unknown family.
        UsageError: random weights of a recipe that does not say its sizes.
    """
    from gap_export.families.common.checkpoints.random_weights import random_source

    family = find_family(recipe)
    builder = load_builder(family)
    if checkpoint.random_seed is not None:
        return random_source(recipe, builder.expected_tensors, seed=checkpoint.random_seed)
    check_named_parts(recipe, checkpoint)
    for place in checkpoint.parts.values():
        refuse_foreign(place)
    if MAIN not in checkpoint.parts:
        check_required_parts(recipe, checkpoint)
    for layout in builder.layouts:
        if layout.recognizes(checkpoint):
            check_required_parts(recipe, checkpoint)
            return layout.read(recipe, checkpoint, builder.expected_tensors)
    raise _not_recognized(recipe, family, checkpoint.main)


def _not_recognized(recipe: Recipe, family: Family, main: Path) -> CheckpointError:
    """What to say of a main part that is in none of a family's layouts.

    Raises:
        CheckpointError: already its config cannot be read.
    """
    from gap_export.families.common.checkpoints.matching import check_config_readable, look_at

    check_config_readable(main)
    declared = recipe.checkpoint.parts.get(MAIN)
    file = declared.file if declared is not None else None
    layouts = ", ".join(layout.name for layout in load_builder(family).layouts)
    seen, fix = look_at(main), "use the recipe of that model, or name the right folder"
    for place in (main, *_near(main)):
        found = _who_recognizes(place)
        if family in found.values():
            fix = f"name what is one: {place}"
        elif found:
            looks = f"looks like {' or '.join(found)}"
            seen = f"it {looks}" if place == main else f"{place} {looks}"
        if found:
            break
    return CheckpointError(
        f"{main} is not a checkpoint of family {family.name}",
        seen=seen,
        allowed=layouts if file is None else f"{layouts}: the file {file}, or its folder",
        fix=f"{fix} (see: gap-export models)",
    )


def _who_recognizes(place: Path) -> dict[str, Family]:
    """Families that know a place for theirs, by what to call it in a message."""
    found = {}
    for family in all_families().values():
        # Another package's may be broken, which is no matter of this checkpoint.
        with suppress(GapExportError):
            for layout in load_builder(family).layouts:
                if layout.recognizes(Checkpoint.of(place)):
                    found[f"{family.name} ({layout.name})"] = family
    return found


def _near(main: Path) -> list[Path]:
    """What may have been meant: the folder of a file, or a file that stands alone in a folder."""
    if main.is_file():
        return [main.parent]
    # With a config.json its files do not stand alone.
    if (main / "config.json").exists():
        return []
    try:
        return sorted(path for path in main.iterdir() if path.is_file())[:_MAX_FILES_TRIED]
    except OSError:  # the message has said so
        return []
