"""``gap-export models``: what can be exported here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gap_export.cli._options import JsonOption, QuietOption, VerboseOption, terminal_of
from gap_export.cli._terminal import format_table

if TYPE_CHECKING:
    from gap_export.recipe import Recipe


def models(
    ctx: typer.Context,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """List the models that have a recipe."""
    from gap_export.recipe import list_recipes

    terminal = terminal_of(ctx)
    plain = [_describe(recipe, folder) for recipe, folder in list_recipes()]
    if as_json:
        terminal.json({"models": plain})
        return
    rows = [
        [
            item["name"],
            ", ".join(item["aliases"]) or "-",
            item["family"],
            f"{item['grid'][0]}x{item['grid'][1]} = {item['num_visual_tokens']}",
            item["weights"],
            item["summary"],
        ]
        for item in plain
    ]
    header = ["name", "aliases", "family", "visual tokens", "weights", "summary"]
    terminal.result(format_table(header, rows))


def _describe(recipe: Recipe, folder: Path) -> dict[str, Any]:
    if recipe.checkpoint.kind != "bundled":
        weights = "bring your own folder"
    else:
        weights = "here" if any(folder.glob("*.safetensors")) else "missing"
    return {
        "name": recipe.name,
        "aliases": list(recipe.aliases),
        "family": recipe.family,
        "grid": [recipe.grid.rows, recipe.grid.cols],
        "num_visual_tokens": recipe.grid.num_visual_tokens,
        "weights": weights,
        "license": recipe.license,
        "summary": recipe.summary,
    }
