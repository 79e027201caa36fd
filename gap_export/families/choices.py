"""The independent choices beside who survives: asked for, or as the preset has them."""

from __future__ import annotations

from dataclasses import dataclass

from gap_export.errors import UsageError
from gap_export.manifest import Budget, ExtraToken, Order
from gap_export.pruning import Preset
from gap_export.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Choices:
    """Settled: order, extra token and budget."""

    order: Order
    extra_token: ExtraToken
    budget: Budget


def settle_choices(
    recipe: Recipe,
    preset: Preset,
    *,
    order: Order | None,
    extra_token: ExtraToken | None,
    budget: Budget | None,
    has_keep_ratio: bool,
) -> Choices:
    """What is asked for, or the preset's; a tiled model takes of a preset what it can.

    Tiles are joined row by row: what a score ranks within a tile, a token that stands for others,
    and tiles of different numbers have no place there.

    Args:
        recipe: What the model is.
        preset: The published choices.
        order: Asked for, or None.
        extra_token: Asked for, or None.
        budget: Asked for, or None.
        has_keep_ratio: A share that is given fixes the number, unless an adaptive one is asked for.

    Raises:
        UsageError: the pruner or the model has not got what is asked for.
    """
    is_tiled = recipe.image.tiles is not None
    pruner, name = preset.pruner, preset.name
    for what, asked, allowed in (
        ("order", order, pruner.orders),
        ("extra token", extra_token, pruner.extra_tokens),
        ("budget", budget, preset.budgets),
    ):
        if asked is not None and asked not in allowed:
            raise UsageError(
                f"pruner {name} has no such {what}", seen=asked, allowed=", ".join(allowed)
            )
    if is_tiled:
        for what, asked, only in (
            ("order", order, "raster"),
            ("extra token", extra_token, "none"),
            ("budget", budget, "fixed"),
        ):
            if asked not in {None, only}:
                raise UsageError(
                    f"model {recipe.name} cuts its pictures into tiles, whose tokens stay in order",
                    seen=f"{what} {asked}",
                    allowed=only,
                )
        return Choices(order="raster", extra_token="none", budget="fixed")
    return Choices(
        order=order or preset.order,
        extra_token=extra_token or preset.extra_token,
        budget=budget or ("fixed" if has_keep_ratio else preset.budget),
    )
