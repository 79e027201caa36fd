#!/usr/bin/env python3
"""Measure the demo model's figures in the README, and write them there.

Runs the commands a reader could run, and puts what they print between the markers
``<!-- figures:NAME -->`` and ``<!-- /figures:NAME -->``. Nothing is typed in by hand.

    tools/readme_figures.py                 everything, about ten minutes on two cores
    tools/readme_figures.py --samples 200   quicker and coarser
    tools/readme_figures.py --images-only   the image of GAP above compact ids alone
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

from gap_export.evaluation.refshapes import generate_scene
from gap_export.runtime.session import GroundingSession

ROOT = Path(__file__).resolve().parent.parent
MODEL = "refshapes-llava"
README = ROOT / "README.md"
# What any one command may take.
LIMIT_S = 4 * 3600.0
PICTURES = ROOT / "models" / MODEL / "pictures"
PRUNERS = ("spatial", "random", "cls", "fastervlm", "text")


def main(
    samples: int = 2000, parity_samples: int = 500, seed: int = 0, images_only: bool = False
) -> None:
    """Measure, and rewrite the README."""
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        gap_export("export", MODEL, "--keep", "0.3", "--out", str(bundle), "-q")
        draw_pictures(bundle, Path(scratch))
        if images_only:
            return
        write_section(README, "accuracy", measure_accuracy(samples, seed))
        write_section(README, "parity", measure_parity(bundle, parity_samples, seed))


def measure_accuracy(samples: int, seed: int) -> str:
    """Table of Acc@0.5 for every pruner at keep 0.5 and 0.3."""
    command = ["eval", MODEL, "--pruner", ",".join(PRUNERS), "--keep", "0.5", "--keep", "0.3"]
    command += ["--data", "refshapes", "--samples", str(samples), "--seed", str(seed)]
    report = json.loads(gap_export(*command, "--json"))
    rows = report["rows"]
    whole = rows[0]
    lines = [
        f"`{shlex.join(['gap-export', *command])}`",
        "",
        f"{whole['n']} held-out expressions on {whole['num_images']} pictures, greedy. Unpruned: "
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


def draw_pictures(bundle: Path, scratch: Path) -> None:
    """Draw a few held-out scenes with both boxes and kept tokens, GAP above compact."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    compact = scratch / "compact"
    gap_export(
        "export", MODEL, "--keep", "0.3", "--positions", "compact", "--out", str(compact), "-q"
    )
    rows = []
    for label, folder in (
        ("GAP: kept tokens have the position ids they had before pruning", bundle),
        ("compact ids: kept tokens are numbered anew", compact),
    ):
        with GroundingSession.open(folder) as session:
            tiles = []
            for index in range(4):
                scene = generate_scene(split="heldout", seed=1, index=index)
                drawing, answer, iou = draw_answer(session, scene, scene.expressions[0])
                text = answer.expression
                tiles.append(Tile(drawing=drawing, title=text, note=f"IoU {iou:.2f}"))
            rows.append((label, tiles))
    make_sheet(rows, width=400).quantize(192).save(PICTURES / "gap-and-compact.png", optimize=True)


def write_section(path: Path, name: str, content: str) -> None:
    """Rewrite one marked section of a file."""
    start, end = f"<!-- figures:{name} -->", f"<!-- /figures:{name} -->"
    text = path.read_text(encoding="utf-8")
    if text.count(start) != 1 or text.count(end) != 1:
        raise SystemExit(f"{path.name} has no single section {start} ... {end}")
    head, rest = text.split(start)
    tail = rest.split(end)[1]
    path.write_text(f"{head}{start}\n{content}\n{end}{tail}", encoding="utf-8")


def gap_export(*words: str) -> str:
    """Run the command line as a user would; its standard output."""
    command = [sys.executable, "-m", "gap_export", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=LIMIT_S)
    if done.returncode != 0:
        raise SystemExit(f"{shlex.join(command)} ended with exit code {done.returncode}")
    return done.stdout


def percent(share: float) -> str:
    """0.934 -> "93.4 %"."""
    return f"{100 * share:.1f} %"


def interval(ends: list[float]) -> str:
    """[0.9, 0.95] -> "90.0-95.0 %"."""
    return f"{100 * ends[0]:.1f}-{100 * ends[1]:.1f} %"


if __name__ == "__main__":
    typer.run(main)
