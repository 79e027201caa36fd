#!/usr/bin/env python3
"""Write the model that speed on a CPU is compared with: LLaVA, CLIP-L/14-336 and a 1.1B decoder.

    tools/write_shape.py FOLDER      2.8 GB of random float16 weights, a tokenizer, a recipe

Then ``gap-export FOLDER --keep 0.3`` exports it, as any checkpoint with its own recipe.
"""

from __future__ import annotations

from pathlib import Path

import typer
from export_bench.small import write_small
from pages import note


def main(folder: Path) -> None:
    """Write it, unless it is there."""
    note("written" if write_small(folder) else "there already")


if __name__ == "__main__":
    typer.run(main)
