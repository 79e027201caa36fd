"""Families of models. A new one is a file and a line here; nothing else names a family.

Families are built on torch and transformers, whose imports take seconds. What is asked of a model
before anything is built (its pruners, what an option means for it) needs neither, so that a slip is
told at once.
"""

from __future__ import annotations

import reprlib
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
from gap_export.errors import CheckpointError, RecipeError, UnsupportedPrunerError, UsageError
from gap_export.families.common.choices import AskedChoices, settle_choices
from gap_export.families.common.readings import clip_readings, eva_readings
from gap_export.progress import Progress
from gap_export.pruning import FixedPruner, Reading, all_presets, find_preset
from gap_export.spec.manifest import PruningSpec
from gap_export.spec.positions import PositionMode, num_kept_tokens
from gap_export.spec.recipe import Recipe

if TYPE_CHECKING:
    from typing import Unpack

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

# What a signed 64-bit integer holds, in JSON readers of other languages too.
MAX_SEED = 2**63 - 1
# TensorRT's TopK takes no more.
MAX_RANKED_TOKENS = 3840
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
    readings = find_readings(recipe)
    return tuple(name for name, preset in all_presets().items() if preset.pruner.reads <= readings)


def resolve_pruning(
    recipe: Recipe,
    *,
    pruner: str | None,
    keep_ratio: float | None,
    positions: PositionMode,
    seed: int,
    **asked: Unpack[AskedChoices],
) -> PruningSpec:
    """Check a pruning request against a model and settle its numbers.

    Args:
        recipe: What the model is.
        pruner: Name of its preset; None for the recipe's default.
        keep_ratio: In (0, 1]; None for the recipe's default. With an adaptive budget the most that
            is kept; None for no bound.
        positions: Which ids they get.
        seed: Of the pruners that draw.
        **asked: The other choices, see :class:`AskedChoices`.

    Raises:
        UsageError: no such pruner, a keep ratio outside (0, 1], a seed outside 0..2**63 - 1, more
            tokens than can be ranked, an order, extra token or budget the pruner has not got, a
            position of an extra token that is not there, a text where none is read, or a question
            that the recipe does not mark.
        UnsupportedPrunerError: the model lacks what the pruner reads.
        RecipeError: the recipe's default pruner does not exist, or does not fit its model.
    """
    if pruner is None:
        pruner = _default_pruner(recipe)
    preset = find_preset(pruner)
    chosen = preset.pruner
    lacking = chosen.reads - find_readings(recipe)
    if lacking:
        raise UnsupportedPrunerError(
            f"model {recipe.name} cannot serve pruner {pruner}, it lacks",
            seen=", ".join(sorted(lacking)),
            allowed=", ".join(supported_pruners(recipe)),
        )
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise UsageError("seed out of range", seen=reprlib.repr(seed), allowed=f"0..{MAX_SEED}")
    choices = settle_choices(recipe, preset, asked, has_keep_ratio=keep_ratio is not None)
    extra_position = asked.get("extra_position")
    if extra_position is not None and choices.extra_token == "none":
        raise UsageError(
            f"pruner {pruner} as it is used here adds no extra token that could have a position",
            seen=extra_position,
            fix="choose an extra token (--extra-token), or leave out --extra-position",
        )
    num_visual = recipe.grid.num_visual_tokens
    if num_visual > MAX_RANKED_TOKENS and not isinstance(chosen, FixedPruner):
        raise UsageError(
            f"pruner {pruner} cannot rank so many visual tokens",
            seen=num_visual,
            allowed=f"{MAX_RANKED_TOKENS} at most, which is all that TensorRT's TopK takes",
            fix="use a pruner that does not rank: spatial or random",
        )
    adaptive = choices.budget == "adaptive"
    if keep_ratio is None:
        keep_ratio = 1.0 if adaptive else recipe.defaults.keep_ratio
    num_kept, extra = num_kept_tokens(keep_ratio, num_visual), choices.extra_token
    if num_kept == num_visual and extra != "none":
        # Nothing is dropped that an extra token could stand for.
        num_kept, extra = (num_visual - 1, extra) if adaptive else (num_visual, "none")
    sign = recipe.text_tower.similarity_sign if recipe.text_tower is not None else None
    return PruningSpec(
        pruner=pruner,
        order=choices.order,
        extra_token=extra,
        positions=positions,
        keep_ratio=keep_ratio,
        seed=seed if chosen.uses_seed else None,
        num_visual_tokens=num_visual,
        num_kept_tokens=num_kept,
        num_emitted_tokens=num_kept + int(extra != "none"),
        text_similarity_sign=sign if "text" in chosen.reads else None,
        extra_position=(extra_position or "last") if extra != "none" else "last",
        budget=choices.budget,
        pruner_text=choices.pruner_text,
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
