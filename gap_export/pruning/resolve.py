"""From what is asked for to what is done: the one place where a pruning request meets a model."""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from typing import get_args

from gap_export.errors import RecipeError, UnsupportedPrunerError, UsageError
from gap_export.pruning.preset import Preset
from gap_export.pruning.presets import all_presets, find_preset
from gap_export.pruning.pruner import FixedPruner
from gap_export.spec.manifest import Budget, ExtraToken, Order, PrunerText, PruningSpec
from gap_export.spec.positions import num_kept_tokens
from gap_export.spec.recipe import Recipe
from gap_export.spec.requests import PruningRequest

# What a signed 64-bit integer holds, in JSON readers of other languages too.
MAX_SEED = 2**63 - 1
# TensorRT's TopK takes no more.
MAX_RANKED_TOKENS = 3840


def served_pruners(readings: Collection[str]) -> tuple[str, ...]:
    """Names of the pruners that need no more than these readings."""
    return tuple(
        name for name, preset in all_presets().items() if preset.pruner.reads <= set(readings)
    )


def check_seed(seed: int) -> None:
    """Refuse a seed that a manifest cannot hold.

    Raises:
        UsageError: it is out of range.
    """
    if type(seed) is not int or not 0 <= seed <= MAX_SEED:
        raise UsageError("seed out of range", seen=reprlib.repr(seed), allowed=f"0..{MAX_SEED}")


def resolve_request(
    recipe: Recipe, request: PruningRequest, readings: Collection[str]
) -> PruningSpec:
    """Check a pruning request against a model and settle its numbers.

    Args:
        recipe: What the model is.
        request: What is asked for.
        readings: What a pruner may read from the model.

    Raises:
        UsageError: no such pruner, a keep ratio outside (0, 1], a seed outside 0..2**63 - 1, more
            tokens than can be ranked, an order, extra token or budget the pruner has not got, a
            position of an extra token that is not there, a text where none is read, or a question
            that the recipe does not mark.
        UnsupportedPrunerError: the model lacks what the pruner reads.
        RecipeError: the recipe's default pruner does not exist, or does not fit its model.
    """
    seed, keep_ratio = request.seed, request.keep_ratio
    preset = find_preset(
        _default_pruner(recipe, readings) if request.pruner is None else request.pruner
    )
    name, pruner = preset.name, preset.pruner
    lacking = pruner.reads - set(readings)
    if lacking:
        raise UnsupportedPrunerError(
            f"model {recipe.name} cannot serve pruner {name}, it lacks",
            seen=", ".join(sorted(lacking)),
            allowed=", ".join(served_pruners(readings)),
        )
    check_seed(seed)
    order, extra, budget = _settle_choices(recipe, preset, request)
    pruner_text = _settle_text(recipe, preset, request.pruner_text)
    if request.extra_position is not None and extra == "none":
        raise UsageError(
            f"pruner {name} as it is used here adds no extra token that could have a position",
            seen=request.extra_position,
            fix="choose an extra token (--extra-token), or leave out --extra-position",
        )
    num_visual = recipe.grid.num_visual_tokens
    if num_visual > MAX_RANKED_TOKENS and not isinstance(pruner, FixedPruner):
        raise UsageError(
            f"pruner {name} cannot rank so many visual tokens",
            seen=num_visual,
            allowed=f"{MAX_RANKED_TOKENS} at most, which is all that TensorRT's TopK takes",
            fix="use a pruner that does not rank: spatial or random",
        )
    adaptive = budget == "adaptive"
    if keep_ratio is None:
        keep_ratio = 1.0 if adaptive else recipe.defaults.keep_ratio
    num_kept = num_kept_tokens(keep_ratio, num_visual)
    if num_kept == num_visual and extra != "none":
        # Nothing is dropped that an extra token could stand for.
        num_kept, extra = (num_visual - 1, extra) if adaptive else (num_visual, "none")
    sign = None
    if "text" in pruner.reads and recipe.text_tower is not None:
        sign = recipe.text_tower.similarity_sign
    elif pruner.reads_text:
        # The decoder's words are no CLIP, whose similarity may be inverted.
        sign = 1
    return PruningSpec(
        pruner=name,
        order=order,
        extra_token=extra,
        positions=request.positions,
        keep_ratio=keep_ratio,
        seed=seed if pruner.uses_seed else None,
        num_visual_tokens=num_visual,
        num_kept_tokens=num_kept,
        num_emitted_tokens=num_kept + int(extra != "none"),
        text_similarity_sign=sign,
        extra_position=(request.extra_position or "last") if extra != "none" else "last",
        budget=budget,
        pruner_text=pruner_text,
        attention=request.attention,
    )


def _default_pruner(recipe: Recipe, readings: Collection[str]) -> str:
    """The pruner a recipe names, which its writer and not the user got wrong if it will not do."""
    name, usable = recipe.defaults.pruner, served_pruners(readings)
    if name not in usable:
        raise RecipeError(
            f"recipe {recipe.name}: defaults.pruner is not one its model can serve",
            seen=reprlib.repr(name),
            allowed=", ".join(usable),
            fix="correct the recipe, or name a pruner: --pruner",
        )
    return name


def _settle_choices(
    recipe: Recipe, preset: Preset, request: PruningRequest
) -> tuple[Order, ExtraToken, Budget]:
    """What is asked for, or the preset's; a tiled model takes of a preset what it can.

    Tiles are joined row by row: what a score ranks within a tile, a token that stands for others,
    and tiles of different numbers have no place there. A keep ratio that is given fixes the number,
    unless an adaptive budget is asked for.

    Raises:
        UsageError: the pruner or the model has not got what is asked for.
    """
    asked = (
        ("order", request.order, preset.pruner.orders, "raster"),
        ("extra token", request.extra_token, preset.pruner.extra_tokens, "none"),
        ("budget", request.budget, preset.budgets, "fixed"),
    )
    for what, value, allowed, _ in asked:
        if value is not None and value not in allowed:
            raise UsageError(
                f"pruner {preset.name} has no such {what}", seen=value, allowed=", ".join(allowed)
            )
    if recipe.image.tiles is None:
        fixed = request.keep_ratio is not None
        return (
            request.order or preset.order,
            request.extra_token or preset.extra_token,
            request.budget or ("fixed" if fixed else preset.budget),
        )
    for what, value, _, only in asked:
        if value not in {None, only}:
            raise UsageError(
                f"model {recipe.name} cuts its images into tiles, whose tokens stay in order",
                seen=f"{what} {value}",
                allowed=only,
            )
    return "raster", "none", "fixed"


def _settle_text(recipe: Recipe, preset: Preset, asked: PrunerText | None) -> PrunerText:
    """What is read of the text; of a pruner that reads no text it means nothing.

    Raises:
        UsageError: the pruner reads no text, there is no such text, or the recipe does not say
            where the question stands.
    """
    if asked is not None and asked not in get_args(PrunerText):
        raise UsageError(
            f"pruner {preset.name} has no such text to read",
            seen=asked,
            allowed=", ".join(get_args(PrunerText)),
        )
    if not preset.pruner.reads_text:
        if asked is not None:
            raise UsageError(
                f"pruner {preset.name} reads no text that could be chosen",
                seen=f"--pruner-text {asked}",
                fix="leave out --pruner-text, or choose a pruner that reads the text",
            )
        return "expression"
    text = asked or preset.pruner_text
    if text == "question" and recipe.prompt.question_template() is None:
        raise UsageError(
            f"pruner {preset.name} reads the question, and recipe {recipe.name} does not say where "
            "it stands in the prompt",
            seen=f"prompt.question {'missing' if recipe.prompt.question is None else 'not found'}",
            allowed="start, end and image, as they are in prompt.template",
            fix="add them to the recipe, or use --pruner-text expression",
        )
    return text
