"""``gap-export models``: what can be exported here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gap_export.cli._options import JsonOption, QuietOption, VerboseOption, terminal_of
from gap_export.cli._terminal import format_table
from gap_export.visible import visible_strings

if TYPE_CHECKING:
    from gap_export.errors import GapExportError
    from gap_export.spec.recipe import Recipe

_BUNDLED, _HERE, _INCOMPLETE, _MISSING = "bundled", "here", "incomplete", "missing"


def models(
    ctx: typer.Context,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """List the models that have a recipe, and whether their weights are here."""
    from gap_export.spec.recipe import broken_recipes, list_recipes

    terminal = terminal_of(ctx)
    plain = [_describe(recipe, folder) for recipe, folder in list_recipes()]
    broken = [str(err) for err in (*_broken_families(), *broken_recipes())]
    if as_json:
        terminal.json({"models": plain, "broken": broken})
        return
    plain = visible_strings(plain)
    header = ["name", "aliases", "family", "visual tokens", "weights"]
    lines = format_table(header, [_table_row(item) for item in plain]).splitlines()
    # The first row is below the header and its rule; from the end, so that no place moves.
    for place, item in reversed(list(enumerate(plain, start=3))):
        optional = [
            f"{part['role']} ({_state(part)})" for part in item["parts"] if not part["required"]
        ]
        more = [f"  {item['summary']} ({item['license']})"]
        if item["license_note"]:
            more.append(f"  {item['license_note']}")
        if optional:
            more.append(f"  optional: {', '.join(optional)}")
        lines[place:place] = more
    terminal.result("\n".join(lines))
    for why in broken:
        terminal.warning(why)
    missing = [item for item in plain if item["weights"] not in {_BUNDLED, _HERE}]
    if missing:
        terminal.message(
            "missing weights: `gap-export NAME` says how to get them; --checkpoint [ROLE=]PATH "
            "names those that lie elsewhere; --random-weights does without"
        )


def _broken_families() -> list[GapExportError]:
    """Why families of other packages cannot be used; where there are none, nothing is imported."""
    from gap_export.spec.family import OTHER_FAMILIES

    if not OTHER_FAMILIES.entries:
        return []
    from gap_export.families import broken_families

    return list(broken_families().values())


def _table_row(item: dict[str, Any]) -> list[str]:
    rows, cols = item["grid"]
    return [
        item["name"],
        ", ".join(item["aliases"]) or "-",
        item["family"],
        f"{rows}x{cols} = {item['num_visual_tokens']}" + (" a tile" if item["tiled"] else ""),
        item["weights"],
    ]


def _describe(recipe: Recipe, folder: Path) -> dict[str, Any]:
    from gap_export.checkpoint.find.hub_cache import look_for

    parts = []
    for role, part in recipe.checkpoint.parts.items():
        search = look_for(role, recipe.checkpoint.parts)
        parts.append(
            {
                "role": role,
                "what": part.what,
                "hub": part.hub.id if part.hub is not None else None,
                "also": [repository.id for repository in part.also],
                "url": part.url,
                "file": part.file,
                "required": bool(part.required),
                "path": None if search.place is None else str(search.place),
                "incomplete": search.place is None and search.unfinished is not None,
            }
        )
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
        "license_note": recipe.license_note,
        "summary": recipe.summary,
    }


def _weights(recipe: Recipe, folder: Path, parts: list[dict[str, Any]]) -> str:
    if recipe.checkpoint.kind == "bundled":
        return _BUNDLED if any(folder.glob("*.safetensors")) else _MISSING
    by_state: dict[str, list[str]] = {_INCOMPLETE: [], _MISSING: []}
    for part in parts:
        if part["required"] and part["path"] is None:
            by_state[_state(part)].append(part["role"])
    lacking = [f"{state}: {', '.join(roles)}" for state, roles in by_state.items() if roles]
    return "; ".join(lacking) or _HERE


def _state(part: dict[str, Any]) -> str:
    if part["path"] is not None:
        return _HERE
    return _INCOMPLETE if part["incomplete"] else _MISSING
