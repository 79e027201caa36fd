#!/usr/bin/env python3
"""Draw held-out scenes of RefShapes-2, each with an expression and the box that answers it.

tools/draw_scenes.py                       writes docs/images/refshapes-2.png
tools/draw_scenes.py --seed 3 --out x.png
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer
from image_sheet import Tile, add_true_box, make_sheet
from pages import IMAGES
from PIL import Image

from gap_export.evaluation.refshapes2 import Scene, generate_scene

_SCALE, _WIDTH, _HEIGHT = 3, 620, 560
_ROWS, _COLUMNS = 2, 4


def main(
    seed: Annotated[int, typer.Option(min=0, help="Of the held-out scenes.")] = 0,
    out: Path = IMAGES / "refshapes-2.png",
) -> None:
    """Write the sheet."""
    drawn: Counter[str] = Counter()
    tiles = []
    for index in range(_ROWS * _COLUMNS):
        scene = generate_scene(split="heldout", seed=seed, index=index)
        # Kinds that were not shown yet come first.
        number = min(range(len(scene.expressions)), key=lambda i: drawn[scene.expressions[i].kind])
        drawn[scene.expressions[number].kind] += 1
        tiles.append(draw(scene, number))
    rows = [("", tiles[row * _COLUMNS :][:_COLUMNS]) for row in range(_ROWS)]
    sheet = make_sheet(rows, width=_WIDTH, legend=False)
    sheet.resize((sheet.width // 2, sheet.height // 2), Image.Resampling.LANCZOS).save(out)


def draw(scene: Scene, number: int) -> Tile:
    """A scene in the middle of a tile, with the answer to one of its expressions."""
    one = scene.expressions[number]
    image = Image.fromarray(scene.image)
    fits = min(_SCALE, _WIDTH / image.width, _HEIGHT / image.height)
    image = image.resize((round(image.width * fits), round(image.height * fits)))
    add_true_box(image, scene.objects[one.target].box, fits)
    tile = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    tile.paste(image, ((_WIDTH - image.width) // 2, (_HEIGHT - image.height) // 2))
    return Tile(drawing=tile, title=one.text)


if __name__ == "__main__":
    typer.run(main)
