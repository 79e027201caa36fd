"""The conductor: every way to export a model, what each costs on a device, and which to take."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gap_export.errors import UsageError
from gap_export.planning.devices import Device
from gap_export.planning.estimate import answer_times, memory_of
from gap_export.planning.model import PlannedModel, Work, cache_bytes_a_token, weights_of
from gap_export.planning.results import Accuracy, Configuration, PlanReport
from gap_export.progress import Progress, SilentProgress
from gap_export.spec.recipe import models_dir
from gap_export.spec.requests import PruningRequest

KEEPS = (1.0, 0.7, 0.5, 0.3, 0.2, 0.1)
_GB = 1e9
_FLOATS = {"float16", "float32", "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What an answer may take.

    Attributes:
        latency_ms: From image to box, but for reading the image; None: any.
        memory_bytes: Of the model and its runtime; None: what the device has.
    """

    latency_ms: float | None = None
    memory_bytes: float | None = None

    def room_on(self, device: Device) -> float:
        """Bytes that the model may take.

        Raises:
            UsageError: the budget is more than the device has.
        """
        there = device.memory_gb * _GB
        if self.memory_bytes is None:
            return there - device.system_gb[0] * _GB
        if self.memory_bytes > there:
            raise UsageError(
                "the budgets contradict each other: the device has less memory",
                seen=f"{self.memory_bytes / _GB:g} GB on {device.name}",
                allowed=f"up to {device.memory_gb:g} GB",
                fix="leave out --memory, or name a larger device",
            )
        return self.memory_bytes


def make_plan(
    model: PlannedModel,
    device: Device,
    budget: Budget,
    *,
    keeps: Sequence[float],
    pruners: Sequence[str],
    dtypes: Sequence[str],
    canvases: Sequence[str],
    called: str,
    progress: Progress | None = None,
) -> PlanReport:
    """Look at every combination.

    Args:
        model: What is exported.
        device: Where it runs.
        budget: What it may take.
        keeps: Shares of visual tokens.
        pruners: By what they are chosen.
        dtypes: As ``--dtype`` has them.
        canvases: ``WxH`` each.
        called: MODEL as the user wrote it, for the command.
        progress: Progress reporter.

    Raises:
        UsageError: the model cannot be pruned so, or the budget is more than the device has.
    """
    room = budget.room_on(device)
    # Where all tokens are kept, it does not matter by what.
    asked = [
        (canvas, keep, pruner)
        for canvas in canvases
        for keep in keeps
        for pruner in (pruners if keep < 1 else pruners[:1])
    ]
    found: list[Configuration] = []
    with (progress or SilentProgress()).stage("counting", len(asked)) as advance:
        for canvas, keep, pruner in asked:
            own = canvas if len(canvases) > 1 or canvas not in model.canvases()[:1] else None
            work = model.work(PruningRequest(keep_ratio=keep, pruner=pruner, canvas=canvas))
            found += [
                _configuration(model, device, budget, room, work, dtype, called, own)
                for dtype in dtypes
            ]
            advance(1)
    front = _front(found)
    found = [replace(one, on_front=n in front) for n, one in enumerate(found)]
    chosen = _first(found, [n for n, one in enumerate(found) if one.meets])
    return PlanReport(
        model=model.recipe.name,
        device=device.name,
        device_facts=device.model_dump(mode="json", exclude={"name"}),
        answer_tokens=model.answer_tokens,
        text_tokens=model.text_tokens,
        latency_ms=budget.latency_ms,
        memory_bytes=room,
        configurations=tuple(found),
        chosen=chosen,
        largest=None if chosen is not None else _nearest(found),
        notes=_notes(found, device),
    )


def _configuration(
    model: PlannedModel,
    device: Device,
    budget: Budget,
    room: float,
    work: Work,
    dtype: str,
    called: str,
    canvas: str | None,
) -> Configuration:
    floats = dtype if dtype in _FLOATS else device.dtypes[0]
    weights = weights_of(work, dtype, floats)
    times = answer_times(work.costs, weights, device, answer_tokens=model.answer_tokens)
    memory = memory_of(
        work.costs,
        weights,
        device,
        cache_bytes_a_token=cache_bytes_a_token(work),
        prompt_tokens=work.prompt_tokens,
        new_tokens=model.recipe.prompt.max_new_tokens,
    )
    fits = memory["total"].high <= room
    soon = budget.latency_ms is None or times["total"].likely <= budget.latency_ms
    pruning = work.pruning
    words = ["gap-export", called, "--keep", f"{pruning.keep_ratio:g}", "--pruner", pruning.pruner]
    words += [*("--canvas", canvas)] if canvas is not None else []
    words += ["--dtype", dtype]
    words += ["--for", "cpu"] if device.target is None else ["--trt", device.target]
    return Configuration(
        keep_ratio=pruning.keep_ratio,
        pruner=pruning.pruner,
        dtype=dtype,
        canvas=work.canvas,
        prompt_tokens=work.prompt_tokens,
        visual_tokens=work.visual_tokens,
        multiply_adds={name: cost.multiply_adds for name, cost in work.costs.items()},
        times=times,
        memory=memory,
        accuracy=find_accuracy(model.recipe.name, pruning.pruner, pruning.keep_ratio)
        if canvas is None and dtype in _FLOATS
        else None,
        fits=fits,
        meets=fits and soon,
        on_front=False,
        command=shlex.join(words),
    )


def find_accuracy(model: str, pruner: str, keep_ratio: float) -> Accuracy | None:
    """What was measured with GAP's positions; None where nothing was."""
    file = models_dir() / model / "accuracy.csv"
    if not file.is_file():
        return None
    with file.open(encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            unpruned = keep_ratio == 1 and row["pruner"] == row["positions"] == "none"
            same = row["pruner"] == pruner and row["positions"] == "gap"
            if float(row["keep_ratio"]) == keep_ratio and (unpruned or same):
                return Accuracy(
                    acc_at_50=float(row["acc_at_50"]),
                    interval=(float(row["ci95_low"]), float(row["ci95_high"])),
                    n=int(row["n"]),
                )
    return None


def _quality(one: Configuration) -> tuple[float, float]:
    """Accuracy where it was measured; visual tokens stand for it elsewhere."""
    return (one.accuracy.acc_at_50 if one.accuracy else 0.0, float(one.visual_tokens))


def _front(found: Sequence[Configuration]) -> set[int]:
    """Places of those that no other is at least as good as in time, memory and quality."""
    measured = all(one.accuracy for one in found)

    def merits(one: Configuration) -> tuple[float, float, float]:
        quality = _quality(one)[0 if measured else 1]
        return -one.latency_ms.likely, -one.memory_bytes.high, quality

    rows = [merits(one) for one in found]
    return {
        n
        for n, mine in enumerate(rows)
        if not any(
            theirs != mine and all(a >= b for a, b in zip(theirs, mine, strict=True))
            for theirs in rows
        )
    }


def _first(found: Sequence[Configuration], places: Sequence[int]) -> int | None:
    """Of those, what keeps most of the image, then the one that answers soonest."""
    return max(
        places,
        key=lambda n: (found[n].visual_tokens, -found[n].latency_ms.likely),
        default=None,
    )


def _nearest(found: Sequence[Configuration]) -> int | None:
    """The largest that fits, if late; else the smallest of all."""
    fitting = [n for n, one in enumerate(found) if one.fits]
    if fitting:
        return min(fitting, key=lambda n: found[n].latency_ms.likely)
    return min(range(len(found)), key=lambda n: found[n].memory_bytes.high, default=None)


def _notes(found: Sequence[Configuration], device: Device) -> tuple[str, ...]:
    notes = [
        "time is of tower, prefill and decode; reading the image, tokenizing and the program "
        "around them are not in it",
    ]
    if not device.fits:
        notes.append(
            "no benchmark of this device was given, so what it reaches of its peaks is a wide "
            "range, and what starting an operator costs, which is most of a small model's time, "
            "is not in it: --measured FILE, as bench --report-json writes it there"
        )
    if any(one.dtype == "int4" for one in found):
        notes.append("accuracy was measured in floats; INT4 costs some: docs/results/quantization")
    if any(one.accuracy is None for one in found):
        notes.append("where no accuracy was measured, the visual tokens that are kept stand for it")
    return tuple(notes)
