#!/usr/bin/env python3
"""Draw what every pruner keeps of one held-out picture, with a heat map of its scores.

tools/draw_pruners.py        writes models/refshapes-llava/pictures/pruners.png
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import typer
from PIL import Image, ImageDraw, ImageFont

from gap_export.evaluation.refshapes import generate_scene
from gap_export.families import supported_pruners
from gap_export.pipeline import ExportOptions, GraphCache, export_model
from gap_export.recipe import find_recipe
from gap_export.runtime.drawing import draw_grounding
from gap_export.runtime.session import GroundingSession

MODEL = "refshapes-llava"
ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "models" / MODEL / "pictures" / "pruners.png"
COLUMNS = 5
WIDTH, HEIGHT, GAP, TITLE = 300, 452, 8, 26


def main(
    keep: float = 0.3, seed: int = 1, scene: int = 5, expression: int = 1, out: Path = TARGET
) -> None:
    """Export every pruner, ask each the same, and put the drawings side by side."""
    shown = generate_scene(split="heldout", seed=seed, index=scene)
    text = shown.expressions[expression].text
    names = supported_pruners(find_recipe(MODEL)[0])
    rows = -(-len(names) // COLUMNS)
    sheet = Image.new(
        "RGB", (COLUMNS * (WIDTH + GAP) - GAP, rows * (HEIGHT + TITLE + GAP) - GAP), "white"
    )
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=TITLE - 8)
    cache = GraphCache()
    with tempfile.TemporaryDirectory() as scratch:
        for number, name in enumerate(names):
            bundle = Path(scratch) / str(number)
            options = ExportOptions(model=MODEL, pruner=name, keep_ratio=keep, out=bundle)
            export_model(options, cache=cache)
            with GroundingSession.open(bundle) as session:
                drawing = draw_grounding(shown.image, session.ground(shown.image, text))
            left = number % COLUMNS * (WIDTH + GAP)
            top = number // COLUMNS * (HEIGHT + TITLE + GAP)
            pen.text((left, top), name, font=font, fill="black")
            drawing.thumbnail((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
            sheet.paste(drawing, (left, top + TITLE))
            typer.echo(f"drew {name}", err=True)
    sheet.quantize(128).save(out, optimize=True)


if __name__ == "__main__":
    typer.run(main)
