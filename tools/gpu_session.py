#!/usr/bin/env python3
"""Everything that waits for a machine with an NVIDIA GPU, in one command of at most 12 minutes.

    tools/gpu_session.py run                 all steps, into build/gpu-session
    tools/gpu_session.py run                 once more: what was done stays, the rest is tried again
    tools/gpu_session.py run --step check    some steps alone
    tools/gpu_session.py run --rehearse      on the CPU, to see that every step works
    tools/gpu_session.py report --write      results.json and its page into docs/results

Needs no network: the checkout, and of the packages what is there. The base install with
onnxruntime-gpu and the extra ``export`` gives most; nvidia-ml-py adds memory and power, a TensorRT
with cuda-python its engines. What is missing is *not run*, with the reason. Where gap-export is not
installed: ``PYTHONPATH=. python3 tools/gpu_session.py run``.

Each step is a process of its own, so that one that hangs or crashes costs itself alone; what it
found before is kept. results.json in the folder is written after each step, gpu.md at the end.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict
from json import loads
from pathlib import Path
from typing import Annotated, Any

import typer
from export_bench.small import write_small
from gpu_steps.page import page_of
from gpu_steps.place import Place, real_place, rehearsal
from gpu_steps.record import Item, StepRecord, write_json
from gpu_steps.steps import STEPS, Step
from gpu_steps.watch import GpuWatch
from pages import DOCS, ROOT, note, publish

from gap_export.version import __version__

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
WORK = ROOT / "build" / "gpu-session"
PUBLISHED = DOCS / "results" / "gpu.json"
SCHEMA = "gap-export-gpu-session"
_LIMIT_S = 720.0
_POLL_S = 0.1
# A step that would be stopped at once is not begun.
_MIN_STEP_S = 5.0
_OUTCOMES = ("ran", "not run", "failed")
# The item that says how a step's process ended, where that was not well.
_ITSELF = "the step itself"
OutOption = Annotated[Path, typer.Option(help="Folder of the session: a few GB.")]


@app.command("run")
def run_session(
    out: OutOption = WORK,
    step: Annotated[list[str] | None, typer.Option(help="These alone. Repeatable.")] = None,
    limit: Annotated[float, typer.Option(help="Seconds, all steps together.")] = _LIMIT_S,
    rehearse: Annotated[bool, typer.Option(help="The CPU stands for a GPU.")] = False,
) -> None:
    """Do all steps that are not done yet, and write results.json and gpu.md."""
    unknown = [name for name in step or () if name not in STEPS]
    if unknown:
        raise SystemExit(f"no such step: {', '.join(unknown)}; allowed: {', '.join(STEPS)}")
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    results = begin(out, rehearse=rehearse)
    names = list(step or STEPS)
    for number, name in enumerate(names):
        left = limit - (time.monotonic() - start)
        # Time that earlier steps left over is this one's, that of later ones is not.
        spare = left - sum(STEPS[later].limit_s for later in names[number + 1 :])
        allowed = min(left, max(STEPS[name].limit_s, spare))
        note(f"{name}: at most {max(allowed, 0):.0f} s ...")
        found = run_step(STEPS[name], out, limit_s=allowed, rehearse=rehearse)
        results["steps"][name] = found
        write_json(out / "results.json", results)
        count = {o: sum(item["outcome"] == o for item in found["items"]) for o in _OUTCOMES}
        note(f"{name}: {', '.join(f'{n} {o}' for o, n in count.items())}, {found['seconds']:.0f} s")
    # Last, so that a fault of the page costs no figure: `report` writes it again.
    (out / "gpu.md").write_text(page_of(results) + "\n", encoding="utf-8")
    print(out / "gpu.md")


@app.command("step", hidden=True)
def do_step(name: str, out: OutOption = WORK, rehearse: bool = False) -> None:
    """Do one step in this process."""
    place = place_of(out, rehearse=rehearse)
    STEPS[name].work(place, StepRecord(items_file(out, name)))


@app.command("report")
def report(out: OutOption = WORK, write: bool = False) -> None:
    """Print the page of the session, and publish it with its figures.

    Without a session the page says that there was none.
    """
    file = out / "results.json"
    results = loads(file.read_text()) if file.is_file() else None
    if write and results is not None:
        if results["rehearsal"]:
            raise SystemExit("a rehearsal has no figures to publish: run it on a GPU")
        write_json(PUBLISHED, results)
    publish("gpu", page_of(results), write=write)


def begin(out: Path, *, rehearse: bool) -> dict[str, Any]:
    """What the session has found so far.

    Raises:
        SystemExit: the folder holds a session of another machine or version.
    """
    gpu = place_of(out, rehearse=rehearse).gpu
    head = {
        "schema": SCHEMA,
        "schema_version": 1,
        "gap_export": __version__,
        "gpu": f"{gpu.name}, SM {gpu.compute_capability}" if gpu else "a machine without a GPU",
        "rehearsal": rehearse,
    }
    file = out / "results.json"
    if not file.is_file():
        return {**head, "steps": {}}
    results: dict[str, Any] = loads(file.read_text())
    differ = [key for key, value in head.items() if results.get(key) != value]
    if differ:
        told = "; ".join(f"{key}: {results.get(key)}, here {head[key]}" for key in differ)
        raise SystemExit(f"{out} holds another session ({told}): give a folder of its own by --out")
    return results


def run_step(step: Step, out: Path, *, limit_s: float, rehearse: bool) -> dict[str, Any]:
    """Do a step in a process of its own, and watch the GPU meanwhile.

    Args:
        step: Which.
        out: Folder of the session.
        limit_s: Of this step, in this session.
        rehearse: Whether the CPU stands for a GPU.
    """
    file = items_file(out, step.name)
    file.parent.mkdir(exist_ok=True)
    watch, start = GpuWatch(), time.monotonic()
    is_begun = limit_s >= _MIN_STEP_S
    if not is_begun:
        problem = f"not begun: {max(limit_s, 0):.0f} s are left of the session; run it again"
    else:
        command = [sys.executable, __file__, "step", step.name, "--out", str(out)]
        problem = _watched([*command, *(["--rehearse"] if rehearse else [])], limit_s, watch)
    figures = watch.figures()
    watch.close()
    record = StepRecord(file)
    record.items.pop(_ITSELF, None)
    if problem:
        outcome = "failed" if is_begun else "not run"
        record.put(Item(name=_ITSELF, outcome=outcome, reason=problem))
    return {
        "seconds": round(time.monotonic() - start, 1),
        "items": [asdict(item) for item in record.items.values()],
        "gpu": figures,
    }


def _watched(command: list[str], limit_s: float, watch: GpuWatch) -> str:
    """Run a command to its end; how it failed, or nothing."""
    with (
        tempfile.TemporaryFile("w+") as said,
        # A group of its own, so that its workers end with it.
        subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        deadline, problem = time.monotonic() + limit_s, ""
        try:
            while process.poll() is None and not problem:
                watch.sample()
                time.sleep(_POLL_S)
                if time.monotonic() > deadline:
                    problem = f"stopped after {limit_s:.0f} s; run it again for the rest"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        if problem or code == 0:
            return problem
        said.seek(0)
        last = (said.read().strip().splitlines() or ["it said nothing"])[-1]
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"ended with {how}: {last[:300]}"


def items_file(out: Path, name: str) -> Path:
    """Where a step writes down what it found."""
    return out / "steps" / f"{name}.json"


def place_of(out: Path, *, rehearse: bool) -> Place:
    """Where a session runs."""
    return rehearsal(out) if rehearse else real_place(out, write_small)


if __name__ == "__main__":
    app()
