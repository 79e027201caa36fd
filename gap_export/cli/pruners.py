"""``gap-export pruners``: which tokens can be made to survive, and what that takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gap_export.cli._options import JsonOption, QuietOption, VerboseOption, terminal_of
from gap_export.cli._terminal import format_table
from gap_export.visible import visible_strings

if TYPE_CHECKING:
    from gap_export.pruning import Preset

# In words, what a model must have.
_READINGS = {
    "cls_features": "a CLS token",
    "cls_attention": "a CLS token",
    "received_attention": "the attention tokens receive",
    "keys": "the tower's keys",
    "next_layer": "a layer behind the select layer",
    "text": "a CLIP text tower",
    "llm_text": "the decoder's words",
    "image_embeds": "the projected tokens",
    "places": "places in a grid",
    "rope_sums": "the decoder's RoPE",
}
_ADAPTIVE = (
    "adaptive: an image keeps exactly as many tokens as have scores above Q3 + 1.5 (Q3 - Q1), at "
    "least 1 and at most --keep, in ONNX Runtime, TensorRT and PyTorch alike; the default where "
    "--keep is not given."
)
_TEXTS = (
    "(expression), (question): what is read of the text by default, as the pruner's authors have "
    "it; --pruner-text chooses."
)
_WHY = (
    "In-LLM methods need a decoder cut into several graphs whose KV caches differ in length, and "
    "attention weights that fused attention does not give. GAP is about what is dropped before it."
)


def pruners(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="MODEL", help="Say which of them this model can serve."),
    ] = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """List the pruners, what each reads, and what it means by default."""
    terminal = terminal_of(ctx)
    from gap_export.pruning import LEFT_OUT, all_presets, broken_presets

    served = None
    if model is not None:
        from gap_export.families import supported_pruners
        from gap_export.spec.recipe import RECIPE_NAME, find_recipe, load_recipe

        # A folder of the user's with a recipe of its own, as an export takes it.
        own = Path(model) / RECIPE_NAME
        recipe = load_recipe(own) if own.is_file() else find_recipe(model)[0]
        served = frozenset(supported_pruners(recipe))
    plain = [_describe(preset, served) for preset in all_presets().values()]
    broken = {name: str(err) for name, err in broken_presets().items()}
    if as_json:
        terminal.json({"pruners": plain, "left_out": dict(LEFT_OUT), "broken": broken})
        return
    plain = visible_strings(plain)
    header = ["name", "order", "extra token", "budget", "needs"]
    header += [] if served is None else [f"on {model}"]
    lines = format_table(header, [_table_row(item) for item in plain]).splitlines()
    # The first row is below the header and its rule; from the end, so that no place moves.
    for place, item in reversed(list(enumerate(plain, start=3))):
        paper = f" ({item['paper']})" if item["paper"] else ""
        lines.insert(place, f"  {item['summary']}{paper}")
    left_out = "\n".join(f"  {name}: {why}" for name, why in LEFT_OUT.items())
    terminal.result("\n".join([*lines, "", _ADAPTIVE, _TEXTS, "", "not offered:", left_out, _WHY]))
    for why in broken.values():
        terminal.warning(why)


def _describe(preset: Preset, served: frozenset[str] | None) -> dict[str, Any]:
    from gap_export.pruning import FixedPruner

    pruner = preset.pruner
    found = {
        "name": preset.name,
        "summary": pruner.summary,
        "paper": preset.paper,
        "order": preset.order,
        "orders": list(pruner.orders),
        "extra_token": preset.extra_token,
        "extra_tokens": list(pruner.extra_tokens),
        "budget": preset.budget,
        "budgets": list(preset.budgets),
        "reads": sorted(pruner.reads),
        "fixed": isinstance(pruner, FixedPruner),
        "pruner_text": preset.pruner_text if pruner.reads_text else None,
    }
    return found if served is None else {**found, "served": preset.name in served}


def _table_row(item: dict[str, Any]) -> list[str]:
    from gap_export.pruning.pruner import TEXT_READINGS

    # One that reads a text says which; of the two spaces it reads one.
    texts = dict.fromkeys(TEXT_READINGS, f" ({item['pruner_text']})")
    needs = list(dict.fromkeys(_READINGS[one] + texts.get(one, "") for one in item["reads"]))
    row = [item["name"], item["order"], item["extra_token"], item["budget"]]
    row.append(", ".join(needs) or ("nothing" if item["fixed"] else "patch features"))
    return row if "served" not in item else [*row, "yes" if item["served"] else "no"]
