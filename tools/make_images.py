#!/usr/bin/env python3
"""Write held-out RefShapes images, and an expression to look for in each.

    tools/make_images.py --out DIR --count 4

Makes ``DIR/image-1.png``, ... and ``DIR/expressions.tsv``: image, tab, expression.
"""

from __future__ import annotations

from pathlib import Path

import typer
from PIL import Image

from gap_export.evaluation.refshapes import generate_scene


def main(
    out: Path = typer.Option(..., help="Folder for the images."),  # noqa: B008 - typer's way
    count: int = typer.Option(4, min=1, help="How many."),
    seed: int = typer.Option(0, min=0, help="Of the held-out scenes."),
) -> None:
    """Write held-out RefShapes images, and an expression to look for in each."""
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        scene = generate_scene(split="heldout", seed=seed, index=index)
        path = out / f"image-{index + 1}.png"
        Image.fromarray(scene.image).save(path)
        # A different place in the list each time: expressions of different kinds.
        expression = scene.expressions[index % len(scene.expressions)]
        lines.append(f"{path}\t{expression.text}\n")
    (out / "expressions.tsv").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
