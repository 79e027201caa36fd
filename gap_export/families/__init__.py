"""Families of models. A new one is a file and a line here; nothing else names a family.

Families are built on torch and transformers, whose imports take seconds. What is asked of a model
before anything is built (its pruners, what an option means for it) needs neither, so that a slip is
told at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from gap_export.checkpoint.find.foreign import refuse_foreign
from gap_export.checkpoint.find.source import (
    MAIN,
    Checkpoint,
    check_named_parts,
    check_required_parts,
)
from gap_export.errors import CheckpointError, RecipeError
from gap_export.families.common.readings import clip_readings, eva_readings
from gap_export.progress import Progress
from gap_export.pruning import Reading
from gap_export.pruning.resolve import (
    MAX_RANKED_TOKENS,
    MAX_SEED,
    resolve_request,
    served_pruners,
)
from gap_export.spec.manifest import PruningSpec
from gap_export.spec.recipe import Recipe
from gap_export.spec.requests import PruningRequest

if TYPE_CHECKING:
    from gap_export.families.common.reference import (
        Component,
        Device,
        Family,
        ModelSource,
        Reference,
    )

__all__ = [
    "FAMILIES",
    "MAX_RANKED_TOKENS",
    "MAX_SEED",
    "Component",
    "Device",
    "Family",
    "Reference",
    "build_reference",
    "find_family",
    "find_readings",
    "load_family",
    "native_protocol",
    "read_source",
    "resolve_pruning",
    "supported_pruners",
]

# Of a folder that nobody recognises; each may be opened.
_MAX_FILES_TRIED = 16


class _Entry(NamedTuple):
    """A family before it is imported.

    Attributes:
        module: Where it is.
        variable: Its name in there.
        readings: What pruners may read from its models.
        protocol: The evaluation protocol of its authors' own program; None where they publish none.
    """

    module: str
    variable: str
    readings: Callable[[Recipe], frozenset[Reading]]
    protocol: str | None = None


_ENTRIES: Mapping[str, _Entry] = MappingProxyType(
    {
        "llava": _Entry("gap_export.families.llava", "LLAVA", clip_readings),
        "llava_next": _Entry("gap_export.families.llava_next", "LLAVA_NEXT", clip_readings),
        "shikra": _Entry("gap_export.families.shikra", "SHIKRA", clip_readings, "shikra"),
        "minigpt_v2": _Entry(
            "gap_export.families.minigpt_v2", "MINIGPT_V2", eva_readings, "minigpt-v2"
        ),
    }
)


class _Families(Mapping[str, "Family"]):
    """All families by name; one is imported when it is taken."""

    def __getitem__(self, name: str) -> Family:
        entry = _ENTRIES[name]
        family: Family = getattr(import_module(entry.module), entry.variable)
        return family

    def __contains__(self, name: object) -> bool:
        return name in _ENTRIES

    def __iter__(self) -> Iterator[str]:
        return iter(_ENTRIES)

    def __len__(self) -> int:
        return len(_ENTRIES)


FAMILIES: Mapping[str, Family] = _Families()
# Names of this package that are imported when somebody takes them.
_LATE = ("Component", "Device", "Family", "Reference")


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(import_module("gap_export.families.common.reference"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def find_readings(recipe: Recipe) -> frozenset[Reading]:
    """What a pruner may read from a recipe's model; imports no family.

    Raises:
        RecipeError: there is no family of the name it gives.
    """
    _check_family(recipe)
    return _ENTRIES[recipe.family].readings(recipe)


def load_family(recipe: Recipe, progress: Progress) -> None:
    """Import a recipe's family beforehand, and say so where that takes seconds.

    Raises:
        RecipeError: there is none of the name it gives.
    """
    if "torch" not in sys.modules:
        with progress.stage("loading PyTorch"):
            find_family(recipe)


def find_family(recipe: Recipe) -> Family:
    """The family a recipe names.

    Raises:
        RecipeError: there is none of that name.
    """
    _check_family(recipe)
    return FAMILIES[recipe.family]


def _check_family(recipe: Recipe) -> None:
    if recipe.family not in FAMILIES:
        raise RecipeError(
            f"recipe {recipe.name} names an unknown family",
            seen=recipe.family,
            allowed=", ".join(FAMILIES),
        )


def native_protocol(family: str) -> str | None:
    """The evaluation protocol of a family's authors; None where they publish none. Imports none.

    Args:
        family: Its name; of a bundle that another program made it may be unknown here.
    """
    return _ENTRIES[family].protocol if family in _ENTRIES else None


def supported_pruners(recipe: Recipe) -> tuple[str, ...]:
    """Names of the pruners this model can serve."""
    return served_pruners(find_readings(recipe))


def resolve_pruning(recipe: Recipe, request: PruningRequest) -> PruningSpec:
    """Check a pruning request against a model and settle its numbers.

    Raises:
        UsageError: see :func:`gap_export.pruning.resolve.resolve_request`.
    """
    return resolve_request(recipe, request, find_readings(recipe))


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
    family = find_family(recipe)
    source = read_source(recipe, checkpoint)
    return family.build(
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
    if checkpoint.random_seed is not None:
        expected = (
            family.expected_tensors(recipe.architecture) if recipe.architecture is not None else {}
        )
        return random_source(recipe, expected, seed=checkpoint.random_seed)
    check_named_parts(recipe, checkpoint)
    for place in checkpoint.parts.values():
        refuse_foreign(place)
    if MAIN not in checkpoint.parts:
        check_required_parts(recipe, checkpoint)
    for layout in family.layouts:
        if layout.recognises(checkpoint):
            check_required_parts(recipe, checkpoint)
            return layout.read(recipe, checkpoint)
    raise _not_recognised(recipe, family, checkpoint.main)


def _not_recognised(recipe: Recipe, family: Family, main: Path) -> CheckpointError:
    """What to say of a main part that is in none of a family's layouts.

    Raises:
        CheckpointError: already its config cannot be read.
    """
    from gap_export.families.common.checkpoints.matching import check_config_readable, look_at

    check_config_readable(main)
    declared = recipe.checkpoint.parts.get(MAIN)
    file = declared.file if declared is not None else None
    layouts = ", ".join(layout.name for layout in family.layouts)
    seen, fix = look_at(main), "use the recipe of that model, or name the right folder"
    for place in (main, *_near(main)):
        found = _who_recognises(place)
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


def _who_recognises(place: Path) -> dict[str, Family]:
    """Families that know a place for theirs, by what to call it in a message."""
    return {
        f"{family.name} ({layout.name})": family
        for family in FAMILIES.values()
        for layout in family.layouts
        if layout.recognises(Checkpoint.of(place))
    }


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
