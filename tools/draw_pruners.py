#!/usr/bin/env python3
"""Draw what every pruner keeps of one held-out image, with a heat map of its scores.

tools/draw_pruners.py        writes docs/images/pruners.png
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import typer
from image_sheet import Tile, draw_answer, make_sheet
from pages import DEMO_MODEL, IMAGES

from gap_export.evaluation.refshapes import generate_scene
from gap_export.exporting import ExportOptions, GraphCache, export_model
from gap_export.families import supported_pruners
from gap_export.runtime.session import GroundingSession
from gap_export.spec.recipe import find_recipe
from gap_export.spec.requests import PruningRequest

TARGET = IMAGES / "pruners.png"
COLUMNS, WIDTH = 5, 360


def main(
    keep: float = 0.3, seed: int = 1, scene: int = 5, expression: int = 1, out: Path = TARGET
) -> None:
    """Export every pruner, ask each the same, and put the drawings side by side."""
    shown = generate_scene(split="heldout", seed=seed, index=scene)
    asked = shown.expressions[expression]
    tiles = []
    cache = GraphCache()
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(supported_pruners(find_recipe(DEMO_MODEL)[0])):
            bundle = Path(scratch) / str(number)
            options = ExportOptions(
                model=DEMO_MODEL, pruning=PruningRequest(pruner=name, keep_ratio=keep), out=bundle
            )
            export_model(options, cache=cache)
            with GroundingSession.open(bundle) as session:
                drawing, answer, _ = draw_answer(session, shown, asked)
            tiles.append(Tile(drawing=drawing, title=f"{name}: {len(answer.keep_indices)} tokens"))
            typer.echo(f"drew {name}", err=True)
    rows = [("", tiles[start : start + COLUMNS]) for start in range(0, len(tiles), COLUMNS)]
    heading = (
        f"\N{LEFT DOUBLE QUOTATION MARK}{asked.text}\N{RIGHT DOUBLE QUOTATION MARK}, keep {keep:g}"
    )
    make_sheet(rows, width=WIDTH, heading=heading, heat=True).quantize(192).save(out, optimize=True)


if __name__ == "__main__":
    typer.run(main)
