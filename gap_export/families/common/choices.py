"""The independent choices beside who survives: asked for, or as the preset has them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict, get_args

from gap_export.errors import UsageError
from gap_export.pruning import Preset
from gap_export.spec.manifest import Budget, ExtraPosition, ExtraToken, Order, PrunerText
from gap_export.spec.recipe import Recipe


class AskedChoices(TypedDict, total=False):
    """What is asked for; None, or left out, for the preset's.

    Attributes:
        order: In which order kept tokens are fed.
        extra_token: What stands for the dropped ones.
        extra_position: Which id it gets; None for ``last``.
        budget: Whether every image keeps as many; None for the preset's where no keep ratio is
            given, else fixed.
        pruner_text: What a pruner that reads the text reads.
    """

    order: Order | None
    extra_token: ExtraToken | None
    extra_position: ExtraPosition | None
    budget: Budget | None
    pruner_text: PrunerText | None


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Settled. Of a pruner that reads no text ``pruner_text`` means nothing."""

    order: Order
    extra_token: ExtraToken
    budget: Budget
    pruner_text: PrunerText


def settle_choices(
    recipe: Recipe, preset: Preset, asked: AskedChoices, *, has_keep_ratio: bool
) -> Choices:
    """What is asked for, or the preset's; a tiled model takes of a preset what it can.

    Tiles are joined row by row: what a score ranks within a tile, a token that stands for others,
    and tiles of different numbers have no place there.

    Args:
        recipe: What the model is.
        preset: The published choices.
        asked: Its extra position is not read.
        has_keep_ratio: A share that is given fixes the number, unless an adaptive one is asked for.

    Raises:
        UsageError: the pruner or the model has not got what is asked for.
    """
    order, extra_token = asked.get("order"), asked.get("extra_token")
    budget, pruner_text = asked.get("budget"), asked.get("pruner_text")
    is_tiled = recipe.image.tiles is not None
    pruner, name = preset.pruner, preset.name
    for what, value, allowed in (
        ("order", order, pruner.orders),
        ("extra token", extra_token, pruner.extra_tokens),
        ("budget", budget, preset.budgets),
        ("text to read", pruner_text, get_args(PrunerText)),
    ):
        if value is not None and value not in allowed:
            raise UsageError(
                f"pruner {name} has no such {what}", seen=value, allowed=", ".join(allowed)
            )
    text = _settle_text(recipe, preset, pruner_text)
    if is_tiled:
        for what, value, only in (
            ("order", order, "raster"),
            ("extra token", extra_token, "none"),
            ("budget", budget, "fixed"),
        ):
            if value not in {None, only}:
                raise UsageError(
                    f"model {recipe.name} cuts its pictures into tiles, whose tokens stay in order",
                    seen=f"{what} {value}",
                    allowed=only,
                )
        return Choices(order="raster", extra_token="none", budget="fixed", pruner_text=text)
    return Choices(
        order=order or preset.order,
        extra_token=extra_token or preset.extra_token,
        budget=budget or ("fixed" if has_keep_ratio else preset.budget),
        pruner_text=text,
    )


def _settle_text(recipe: Recipe, preset: Preset, asked: PrunerText | None) -> PrunerText:
    """What the text tower reads.

    Raises:
        UsageError: the pruner reads no text, or the recipe does not say where the question stands.
    """
    if "text" not in preset.pruner.reads:
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
