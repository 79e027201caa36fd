"""``gap-export models``: what can be exported here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gap_export.cli._options import JsonOption, QuietOption, VerboseOption, terminal_of
from gap_export.cli._terminal import format_table

if TYPE_CHECKING:
    from gap_export.recipe import CheckpointPart, Recipe

_BUNDLED, _HERE, _MISSING = "bundled", "here", "missing"


def models(
    ctx: typer.Context,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """List the models that have a recipe, and whether their weights are here."""
    from gap_export.recipe import list_recipes

    terminal = terminal_of(ctx)
    plain = [_describe(recipe, folder) for recipe, folder in list_recipes()]
    if as_json:
        terminal.json({"models": plain})
        return
    header = ["name", "aliases", "family", "visual tokens", "weights", "license", "summary"]
    terminal.result(format_table(header, [_table_row(item) for item in plain]))
    missing = [item for item in plain if item["weights"] not in {_BUNDLED, _HERE}]
    if missing:
        terminal.message(
            "missing weights: `gap-export NAME` says how to get them; --checkpoint [ROLE=]PATH "
            "names those that lie elsewhere; --random-weights does without"
        )


def _table_row(item: dict[str, Any]) -> list[str]:
    rows, cols = item["grid"]
    return [
        item["name"],
        ", ".join(item["aliases"]) or "-",
        item["family"],
        f"{rows}x{cols} = {item['num_visual_tokens']}" + (" a tile" if item["tiled"] else ""),
        item["weights"],
        item["license"],
        item["summary"],
    ]


def _describe(recipe: Recipe, folder: Path) -> dict[str, Any]:
    parts = [_describe_part(role, part) for role, part in recipe.checkpoint.parts.items()]
    return {
        "name": recipe.name,
        "aliases": list(recipe.aliases),
        "family": recipe.family,
        "grid": [recipe.grid.rows, recipe.grid.cols],
        "num_visual_tokens": recipe.grid.num_visual_tokens,
        "tiled": recipe.image.tiles is not None,
        "weights": _weights(recipe, folder, parts),
        "parts": parts,
        "license": recipe.license,
        "summary": recipe.summary,
    }


def _describe_part(role: str, part: CheckpointPart) -> dict[str, Any]:
    from gap_export.hub_cache import find_part

    found = find_part(part)
    return {
        "role": role,
        "what": part.what,
        "hub": part.hub.id if part.hub is not None else None,
        "url": part.url,
        "required": bool(part.required),
        "path": None if found is None else str(found),
    }


def _weights(recipe: Recipe, folder: Path, parts: list[dict[str, Any]]) -> str:
    if recipe.checkpoint.kind == "bundled":
        return _BUNDLED if any(folder.glob("*.safetensors")) else _MISSING
    missing = [part["role"] for part in parts if part["required"] and part["path"] is None]
    return f"{_MISSING}: {', '.join(missing)}" if missing else _HERE
