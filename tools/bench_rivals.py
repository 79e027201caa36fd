#!/usr/bin/env python3
"""How fast are our bundles beside what a user would pick instead, on the same weights?

    tools/bench_rivals.py prepare            checkpoint, bundles, and each rival's environment and
                                             model, below build/rivals
    tools/bench_rivals.py measure            all that are there, interleaved with ours; what is
                                             measured already stays: --again measures anew
    tools/bench_rivals.py report --write     the table, into docs/results/speed.md

Each rival is a process of its own, asked in turn with ours, so that ratios hold on a busy machine
too. It must first give the logits that PyTorch gives in float32.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from subprocess import CalledProcessError
from typing import Annotated, Any

import numpy as np
import typer
from export_bench.small import write_small
from pages import ROOT, note, publish
from rival_bench.decoder_alone import write_decoder
from rival_bench.ours import (
    MANY_EXPRESSIONS,
    OURS,
    PRUNED,
    export_ours,
    logits_of,
    open_ours,
    stages_of,
)
from rival_bench.rivals import RIVALS, RivalSpec, find_rival, prepare, python_of, script_of
from rival_bench.rivals import why_missing as why
from rival_bench.serve import PROOF_LENGTH, token_ids
from rival_bench.table import page_of

from gap_export.benchmark.machine import watched
from gap_export.benchmark.process import WorkerProcess
from gap_export.errors import GapExportError

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
WORK = ROOT / "build" / "rivals"
RIVAL_ARGUMENT = Annotated[list[str] | None, typer.Argument(help="Rivals; by default all.")]
NUM_ROUNDS = 3
# What is measured of ours without a rival: many expressions, and memory.
_ALONE = "ours.json"


@app.command("prepare")
def prepare_all(
    rivals: RIVAL_ARGUMENT = None, shape: Path = WORK / "llava-1.1b", work: Path = WORK
) -> None:
    """Make everything that is measured; what is there stays."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "shape").exists():
        write_small(shape)
        (work / "shape").symlink_to(shape.absolute())
    export_ours(work / "shape", work)
    write_decoder(work / "shape", work / "decoder")
    for rival in _chosen(rivals):
        start = time.monotonic()
        try:
            prepare(rival, work, work / "shape", work / "decoder")
        except CalledProcessError as err:
            note(f"{rival.name}: not ready: {err}")
            continue
        note(f"{rival.name}: ready after {time.monotonic() - start:.0f} s")


@app.command("measure")
def measure_all(
    rivals: RIVAL_ARGUMENT = None,
    rounds: int = NUM_ROUNDS,
    work: Path = WORK,
    again: bool = False,
) -> None:
    """Measure each rival between ours, and keep the figures."""
    results = work / "results"
    results.mkdir(exist_ok=True)
    alone = results / _ALONE
    if again or not alone.exists():
        note("measuring ours alone")
        alone.write_text(json.dumps(measure_alone(work), indent=1))
    for rival in _chosen(rivals):
        file = results / f"{rival.name}.json"
        missing = why(rival, work)
        if missing is not None:
            note(f"{rival.name}: skipped: {missing}")
        elif file.exists() and not again:
            note(f"{rival.name}: measured already")
        else:
            note(f"{rival.name}: measuring")
            start = time.monotonic()
            try:
                found = measure(rival, rounds, work)
            except GapExportError as err:
                note(f"{rival.name}: skipped: {err}")
                continue
            file.write_text(json.dumps(found, indent=1))
            note(f"{rival.name}: took {time.monotonic() - start:.0f} s")


@app.command("report")
def report_all(work: Path = WORK, write: bool = False) -> None:
    """Print the table, and put it into its page."""
    files = {one.name: work / "results" / f"{one.name}.json" for one in RIVALS}
    found = [json.loads(file.read_text()) for file in files.values() if file.is_file()]
    if not found:
        sys.exit("nothing is measured yet: tools/bench_rivals.py measure")
    missing = {one.name: why(one, work) or "not measured" for one in RIVALS}
    missing = {n: w for n, w in missing.items() if n not in {one["rival"] for one in found}}
    alone = json.loads((work / "results" / _ALONE).read_text())
    publish("speed", page_of(found, missing, alone), write=write)


def measure(rival: RivalSpec, rounds: int, work: Path) -> dict[str, Any]:
    """One rival and ours, round by round.

    Raises:
        GapExportError: the rival cannot be run, or computes something else.
    """
    command = [str(python_of(rival, work)), *script_of(rival)]
    with ExitStack() as stack:
        worker = stack.enter_context(WorkerProcess(command=command))
        places = {"folder": str(work / rival.name), "shape": str(work / "shape")}
        opened = worker.do("open", **places)
        cosine = _prove(rival, worker, work)
        ours = {
            name: stack.enter_context(open_ours(bundle, backend, work))
            for name, (bundle, backend) in OURS.items()
        }
        turns: dict[str, list[dict[str, float]]] = {name: [] for name in ("rival", *ours)}
        others = []
        # The round before the first warms all of them up.
        for number in range(-1, rounds):
            names = list(turns) if number % 2 else list(turns)[::-1]
            for name in names:
                asked = worker if name == "rival" else ours[name]
                with watched(asked.pid) as load:
                    if name == "rival":
                        stages = worker.do("stages", number=number + 1)
                    else:
                        stages = stages_of(asked, name, number)
                if number >= 0:
                    turns[name].append(stages)
                    others.append(load.others)
        peaks = {name: one.do("memory")["peak"] for name, one in {"rival": worker, **ours}.items()}
    return {
        "rival": rival.name,
        "runs": opened["runs"],
        "open_ms": opened["ms"],
        "cosine": cosine,
        "rounds": rounds,
        "turns": turns,
        "peaks": peaks,
        "others": others,
    }


def measure_alone(work: Path) -> dict[str, Any]:
    """Many expressions about an image, and memory, of a process that is asked nothing else."""
    turns, peaks, cosines = {}, {}, {}
    ids = token_ids(0, PROOF_LENGTH)
    for name, (bundle, backend) in OURS.items():
        if not name.startswith(PRUNED):
            continue
        with open_ours(bundle, backend, work) as worker:
            many = [
                stages_of(worker, name, number, num_expressions=MANY_EXPRESSIONS)
                for number in range(2)
            ]
            turns[backend] = many[1:]
            peaks[backend] = worker.do("memory")["peak"]
        cosines[backend] = _cosine(logits_of(ids, backend, work), work)
        note(f"ours in {backend}: logits cosine {cosines[backend]:.5f} to PyTorch in float32")
    return {"turns": turns, "peaks": peaks, "cosines": cosines}


def _prove(rival: RivalSpec, worker: WorkerProcess, work: Path) -> float:
    """The cosine of its logits and PyTorch's in float32.

    Raises:
        GapExportError: they are of another model.
    """
    cosine = _cosine(worker.do("logits"), work)
    note(f"{rival.name}: logits cosine {cosine:.5f} to PyTorch in float32")
    if not cosine >= rival.least_cosine:
        raise GapExportError(
            "it does not compute the same",
            seen=f"cosine {cosine:.4f}",
            allowed=f">= {rival.least_cosine}",
        )
    return cosine


def _cosine(logits: list[float], work: Path) -> float:
    file = work / "logits.json"
    if not file.is_file():
        torch = find_rival("torch-float32")
        command = [str(python_of(torch, work)), *script_of(torch)]
        with WorkerProcess(command=command) as reference:
            reference.do("open", folder="", shape=str(work / "shape"))
            file.write_text(json.dumps(reference.do("logits")))
    one, two = np.array(json.loads(file.read_text())), np.array(logits)
    return float(one @ two / np.linalg.norm(one) / np.linalg.norm(two))


def _chosen(names: list[str] | None) -> list[RivalSpec]:
    return [find_rival(name) for name in names] if names else list(RIVALS)


if __name__ == "__main__":
    app()
