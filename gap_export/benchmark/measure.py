"""The conductor: one process for each bundle in each backend, asked in turn, round by round.

Whatever else runs on the machine then slows all of them alike, and the memory of one is not in the
figures of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from gap_export.benchmark import machine
from gap_export.benchmark.contenders import Contender, unpruned_of
from gap_export.benchmark.process import WorkerProcess
from gap_export.benchmark.questions import Round
from gap_export.benchmark.results import TOTAL, BenchReport, Memory
from gap_export.benchmark.samples import Sample
from gap_export.benchmark.summary import BenchSettings, Measured, summarize
from gap_export.errors import UsageError
from gap_export.progress import Advance, Progress, SilentProgress

# Below this share of the memory the system begins to drop what was read of files.
_LITTLE_MEMORY = 0.05


def measure(
    contenders: Sequence[Contender],
    rounds: Sequence[Round],
    settings: BenchSettings,
    progress: Progress | None = None,
) -> BenchReport:
    """Measure all contenders, interleaved.

    Args:
        contenders: At least one; of the same weights.
        rounds: What all of them are asked.
        settings: How.
        progress: Progress reporter.

    Raises:
        UsageError: a bar on a speed-up where a pruned bundle has no unpruned one beside it.
        GapExportError: a bundle cannot be opened or run.
    """
    progress = progress or SilentProgress()
    _check_bars(contenders, settings.bars)
    threads = settings.num_threads
    found: dict[str, Measured] = {}
    rates: list[dict[str, float]] = []
    warnings: list[str] = []
    with ExitStack() as stack:
        workers: dict[str, WorkerProcess] = {}
        with progress.stage("opening bundles", len(contenders)) as advance:
            for one in contenders:
                # In a process that does nothing else: what is kept for the next time is made here.
                with WorkerProcess(settings.num_threads) as alone:
                    first = _open(alone, one, settings)
                worker = workers[one.name] = stack.enter_context(WorkerProcess(threads))
                again = _open(worker, one, settings)
                found[one.name] = Measured(
                    open_ms=(first["ms"], again["ms"]), runs=str(again["runs"])
                )
                advance(1)
        probe = stack.enter_context(WorkerProcess(threads))
        with progress.stage("warming up", settings.num_warm_up * len(contenders)) as advance:
            _warm_up(workers, rounds[0], settings.num_warm_up, found, advance)
        available, total = machine.available_memory()
        if available < _LITTLE_MEMORY * total:
            warnings.append(
                "the bundles together fill this machine's memory, so times may be those of its "
                "disk: measure fewer at once"
            )
        names = list(workers)
        with progress.stage("measuring", len(rounds) * len(names)) as advance:
            for asked in rounds:
                rates.append(probe.do("rates"))
                for name in in_turn(names, asked.number):
                    found[name].samples.append(Sample(**workers[name].do("ask", **_order(asked))))
                    advance(1)
        for name, worker in workers.items():
            found[name].memory = Memory(**worker.do("memory"))
        meter = str(probe.do("meter"))
    return summarize(contenders, found, rounds, settings, rates, meter, warnings)


def _open(worker: WorkerProcess, one: Contender, settings: BenchSettings) -> dict[str, Any]:
    opened: dict[str, Any] = worker.do(
        "open",
        bundle=str(one.bundle.path),
        arguments=one.arguments(settings.num_threads),
        answer_tokens=settings.answer_tokens,
    )
    return opened


def _warm_up(
    workers: Mapping[str, WorkerProcess],
    asked: Round,
    num_times: int,
    found: Mapping[str, Measured],
    advance: Advance,
) -> None:
    for time in range(max(1, num_times)):
        for name, worker in workers.items():
            order = _order(asked) | {"number": -1 - time}
            total = Sample(**worker.do("ask", **order)).stages[TOTAL]
            if time == 0:
                found[name].first_call_ms = total
            advance(1)


def _order(asked: Round) -> dict[str, Any]:
    plain = asdict(asked)
    plain["image"] = None if asked.image is None else str(asked.image.absolute())
    return plain


def in_turn(names: Sequence[str], number: int) -> list[str]:
    """Each name once, another one first in each round; then in the opposite order."""
    start = number % len(names)
    turned = [*names[start:], *names[:start]]
    return turned[::-1] if (number // len(names)) % 2 else turned


def _check_bars(contenders: Sequence[Contender], bars: Mapping[str, float]) -> None:
    pruned = [one for one in contenders if not one.is_unpruned]
    alone = [one for one in pruned if unpruned_of(one, contenders) is None]
    if bars and (alone or not pruned):
        raise UsageError(
            "--fail-under needs a pruned bundle, and beside each an unpruned one of the same dtype",
            seen=", ".join(f"{one.label}: {one.dtype}" for one in alone or contenders),
            fix="export one with --keep 1 and name it with --unpruned",
        )
