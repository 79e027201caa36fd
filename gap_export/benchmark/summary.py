"""From samples to a report: which count, what they are shares of, and what wins."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median

from gap_export.benchmark import machine
from gap_export.benchmark.contenders import Contender, costs_of, unpruned_of
from gap_export.benchmark.questions import Round
from gap_export.benchmark.results import (
    PER_TOKEN,
    TOTAL,
    BenchReport,
    BenchRow,
    MachineFacts,
    Memory,
)
from gap_export.benchmark.samples import (
    BUSY_SHARE,
    Sample,
    counting,
    fastest,
    quiet,
    speedups,
    spread_of,
    stage_spreads,
)

# The bar on a whole answer; those on stages have the stages' names.
SPEEDUP = "speedup"


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """How to measure.

    Attributes:
        num_threads: Of one operator; None: as many as the runtime likes.
        num_warm_up: Answers before the first that counts.
        answer_tokens: Tokens of every answer, whatever the model would say; None: as it says.
        bars: By ``speedup`` (of a whole answer) or a stage, how many times as fast as unpruned
            every pruned bundle must be.
    """

    num_threads: int | None = None
    num_warm_up: int = 1
    answer_tokens: int | None = None
    bars: Mapping[str, float] = field(default_factory=dict)


@dataclass(kw_only=True)
class Measured:
    """What one contender gave so far.

    Attributes:
        open_ms: Of its first opening, and of the second.
        runs: What runs it, with its version.
        first_call_ms: Its first answer.
        samples: One of each round.
        memory: Of its process, at the end.
    """

    open_ms: tuple[float, float]
    runs: str
    first_call_ms: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    memory: Memory = field(default_factory=lambda: Memory(peak=0, steady=0, own=0))


def summarize(
    contenders: Sequence[Contender],
    found: Mapping[str, Measured],
    rounds: Sequence[Round],
    settings: BenchSettings,
    rates: Sequence[Mapping[str, float]],
    meter: str,
    warnings: list[str],
) -> BenchReport:
    """Put together what was measured.

    Args:
        contenders: As they were named.
        found: What each gave, by its name.
        rounds: What was asked.
        settings: How.
        rates: Of the machine, in each round.
        meter: What energy was read from, or why it was not.
        warnings: What is doubtful already.
    """
    gemm, bandwidth = (max(rate[name] for rate in rates) for name in ("gemm", "bandwidth"))
    others = median(sample.others for one in found.values() for sample in one.samples)
    rows = tuple(_row(one, contenders, found, gemm, bandwidth) for one in contenders)
    not_quiet = [name for name, one in found.items() if not quiet(one.samples)]
    if not_quiet:
        warnings.append(
            f"the machine is busy: other processes took {100 * others:.0f} % of its processors, "
            f"and too few samples of {', '.join(not_quiet)} are without them, so all count; "
            "measure again when it is quiet"
        )
    recommended, unclear = _recommend(contenders, found)
    return BenchReport(
        model=contenders[0].manifest.model.name,
        rounds=len(rounds),
        expressions=rounds[0].num_expressions,
        machine=MachineFacts(
            processor=machine.processor(),
            num_cpus=len(os.sched_getaffinity(0)),
            gemm_gflops=gemm,
            bandwidth_gb_s=bandwidth,
            others_share=others,
            energy=meter,
        ),
        warnings=(*warnings, *unclear),
        rows=rows,
        recommended=recommended,
        bars=settings.bars,
        failures=_failures(rows, settings.bars),
    )


def _row(
    one: Contender,
    contenders: Sequence[Contender],
    found: Mapping[str, Measured],
    gemm: float,
    bandwidth: float,
) -> BenchRow:
    measured = found[one.name]
    samples = measured.samples
    used = counting(samples)
    stages, costs = stage_spreads(samples), costs_of(one.bundle)
    prompt = mean(sample.prompt_tokens for sample in samples)
    answer = mean(sample.answer_tokens for sample in samples)
    against = unpruned_of(one, contenders)
    theirs = [] if against is None else found[against.name].samples
    joules = [sample.energy_j for sample in used if sample.energy_j is not None]
    done = costs.prefill_operations(prompt) / (stages["prefill"].median / 1e3)
    read = None
    if PER_TOKEN in stages:
        past = prompt + answer / 2
        read = costs.decode_bytes(past) / (stages[PER_TOKEN].median / 1e3)
    return BenchRow(
        name=one.name,
        bundle=str(one.bundle.path),
        backend=one.backend,
        runs=measured.runs,
        dtype=one.dtype,
        keep_ratio=one.manifest.pruning.keep_ratio,
        prompt_tokens=prompt,
        answer_tokens=answer,
        stages=stages,
        open_ms=measured.open_ms,
        first_call_ms=measured.first_call_ms,
        num_busy=sum(sample.others > BUSY_SHARE for sample in samples),
        memory=measured.memory,
        gemm_share=done / 1e9 / gemm,
        bandwidth_share=None if read is None else read / 1e9 / bandwidth,
        speedup=speedups(theirs, samples) if theirs else {},
        ideal=mean(sample.prompt_tokens for sample in theirs) / prompt if theirs else None,
        energy_j=spread_of(joules) if joules else None,
    )


def _recommend(
    contenders: Sequence[Contender], found: Mapping[str, Measured]
) -> tuple[dict[str, str], list[str]]:
    """By bundle the backend that answers soonest, and where another could be as quick."""
    chosen, unclear = {}, []
    for label in dict.fromkeys(one.label for one in contenders):
        of_bundle = {
            one.backend: found[one.name].samples for one in contenders if one.label == label
        }
        if len(of_bundle) < 2:
            continue
        best, others = fastest(of_bundle)
        chosen[label] = best
        if others:
            unclear.append(
                f"{label}: {best} is not clearly faster than {', '.join(others)}; more --rounds "
                "may tell"
            )
    return chosen, unclear


def _failures(rows: Sequence[BenchRow], bars: Mapping[str, float]) -> tuple[str, ...]:
    """What is slower than it must be, or has no figure to tell by, in words."""
    failed = []
    for name, bar in bars.items():
        for row in rows:
            # Only what is pruned has an unpruned one beside it.
            if row.ideal is None:
                continue
            got = row.speedup.get(TOTAL if name == SPEEDUP else name)
            if got is None:
                failed.append(f"{row.name}: {name} was not measured, must be {bar:g}")
            elif got.median < bar:
                failed.append(f"{row.name}: {name} {got.median:.2f}, must be {bar:g}")
    return tuple(failed)
