#!/usr/bin/env python3
"""Accuracy and parity of the demo model, and the image of GAP above renumbered tokens.

    tools/demo_figures.py                   print both tables, about ten minutes on two cores
    tools/demo_figures.py --samples 200     quicker and coarser
    tools/demo_figures.py --write           put them into docs/results, and draw the image
    tools/demo_figures.py --image           draw the image alone

The tables are made of what commands print that a reader can run.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import typer
from image_sheet import Tile, draw_answer, make_sheet
from pages import DEMO_MODEL, IMAGES, interval, percent, publish

from gap_export.evaluation.refshapes import generate_scene
from gap_export.runtime.session import GroundingSession

# What any one command may take.
LIMIT_S = 4 * 3600.0
PRUNERS = ("spatial", "random", "cls", "fastervlm", "text")
# On the image of the front page.
SCENES = 4


def main(
    samples: int = 2000,
    parity_samples: int = 500,
    seed: int = 0,
    image: bool = False,
    write: bool = False,
) -> None:
    """Measure, print, and with --write put the tables into their pages."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        gap_export("export", DEMO_MODEL, "--keep", "0.3", "--out", str(bundle), "-q")
        if image or write:
            draw_image(bundle, Path(scratch))
        if image:
            return
        publish("accuracy", measure_accuracy(samples, seed), write=write)
        publish("parity", measure_parity(bundle, parity_samples, seed), write=write)


def measure_accuracy(samples: int, seed: int) -> str:
    """Table of Acc@0.5 for every pruner at keep 0.5 and 0.3."""
    command = ["eval", DEMO_MODEL, "--pruner", ",".join(PRUNERS), "--keep", "0.5", "--keep", "0.3"]
    command += ["--data", "refshapes", "--samples", str(samples), "--seed", str(seed)]
    report = json.loads(gap_export(*command, "--json"))
    rows = report["rows"]
    whole = rows[0]
    lines = [
        f"`{shlex.join(['gap-export', *command])}`",
        "",
        f"{whole['n']} held-out expressions on {whole['num_images']} images, greedy. Unpruned: "
        f"**{percent(whole['acc_at_50'])}** (95 % interval {interval(whole['ci95'])}).",
        "",
        "| pruner | keep | compact ids | GAP | GAP, 95 % interval | of the unpruned |",
        "|---|---|---|---|---|---|",
    ]
    for compact, gap in zip(rows[1::2], rows[2::2], strict=True):
        lines.append(
            f"| {gap['pruner']} | {gap['keep_ratio']:g} | {percent(compact['acc_at_50'])} "
            f"| **{percent(gap['acc_at_50'])}** | {interval(gap['ci95'])} "
            f"| {percent(gap['recovered'])} |"
        )
    lines.append("")
    for keep in (0.5, 0.3):
        chosen = [row for row in rows if row["keep_ratio"] == keep]
        gaps = [row["recovered"] for row in chosen if row["positions"] == "gap"]
        naive = [row["recovered"] for row in chosen if row["positions"] == "compact"]
        lines.append(
            f"- keep {keep:g}: GAP brings back {percent(sum(gaps) / len(gaps))} of the unpruned "
            f"accuracy on average over the pruners ({percent(min(gaps))} to "
            f"{percent(max(gaps))}); compact ids leave {percent(sum(naive) / len(naive))}."
        )
    return "\n".join(lines)


def measure_parity(bundle: Path, samples: int, seed: int) -> str:
    """Table of the parity report."""
    command = ["check", "BUNDLE", "--samples", str(samples), "--seed", str(seed)]
    run = [str(bundle) if word == "BUNDLE" else word for word in command]
    report = json.loads(gap_export(*run, "--json"))
    (backend,) = report["backends"]
    levels = {level["level"]: level for level in backend["levels"]}
    token, box = levels["token"]["figures"], levels["box"]["figures"]
    lines = [
        f"`{shlex.join(['gap-export', *command])}`",
        "",
        "| graph | output | compared | largest difference | largest value | tolerance |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['component']} | {row['tensor']} | {row['calls']} "
        f"| {row['max_abs_diff']:.1e} | {row['max_abs_reference']:.3g} "
        f"| {row['atol']:g} + {row['rtol']:g} of the value |"
        for row in levels["tensor"]["rows"]
    ]
    lines += [
        "",
        f"Same greedy tokens in {token['equal']} and same boxes in {box['equal']} of "
        f"{token['questions']} questions; {token['ties']} ties, "
        "where PyTorch's two best tokens are closer than rounding.",
    ]
    return "\n".join(lines)


def draw_image(bundle: Path, scratch: Path) -> None:
    """Draw the first held-out scenes with both boxes and the kept tokens, GAP above compact.

    A second sheet, for narrow screens, has the first two of them.
    """
    compact = scratch / "compact"
    gap_export(
        "export", DEMO_MODEL, "--keep", "0.3", "--positions", "compact", "--out", str(compact), "-q"
    )
    rows = [
        ("GAP: kept tokens have the position ids they had before pruning", draw_scenes(bundle)),
        ("compact ids: kept tokens are numbered anew", draw_scenes(compact)),
    ]
    for name, count in (("gap-and-compact", SCENES), ("gap-and-compact-narrow", SCENES // 2)):
        sheet = make_sheet([(label, tiles[:count]) for label, tiles in rows], width=400)
        sheet.quantize(192).save(IMAGES / f"{name}.png", optimize=True)


def draw_scenes(bundle: Path) -> list[Tile]:
    """Ask a bundle the first expression of each scene, and draw the answers."""
    tiles = []
    with GroundingSession.open(bundle) as session:
        for index in range(SCENES):
            scene = generate_scene(split="heldout", seed=1, index=index)
            drawing, answer, iou = draw_answer(session, scene, scene.expressions[0])
            tiles.append(Tile(drawing=drawing, title=answer.expression, note=f"IoU {iou:.2f}"))
    return tiles


def gap_export(*words: str) -> str:
    """Run the command line as a user would; its standard output."""
    command = [sys.executable, "-m", "gap_export", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=LIMIT_S)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} ended with exit code {done.returncode}")
    return done.stdout


if __name__ == "__main__":
    typer.run(main)
