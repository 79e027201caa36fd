"""A benchmark as a document: its words and tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from gap_export.benchmark.results import (
    CPU,
    MANY,
    NEXT,
    PER_TOKEN,
    PREFIX,
    SCHEMA_VERSION,
    STAGES,
    TOTAL,
    BenchReport,
    BenchRow,
    Spread,
)
from gap_export.report.document import Document, Figure, Section, Table, Tile
from gap_export.report.figures.times import draw_times
from gap_export.visible import clean, visible_strings

# Columns after the stages, by what samples call them.
_AFTER = {
    PER_TOKEN: "a token",
    TOTAL: "one answer",
    PREFIX: "prefix",
    NEXT: "next answer",
    MANY: "all expressions",
}
_MIB = 1 << 20


def document_of_bench(report: BenchReport) -> Document:
    """What a benchmark measured, for people."""
    report = visible_strings(report, show=clean)
    machine = report.machine
    return Document(
        command="bench",
        title=f"{report.model}: milliseconds, memory and speed-up",
        status=("failed" if report.failures else "passed") if report.bars else None,
        lead="; ".join(f"{tile.label}: {tile.value}" for tile in _tiles(report)),
        tiles=_tiles(report),
        problems_title="Warnings",
        problems=(*report.failures, *report.warnings),
        facts=(
            ("processor", f"{machine.processor}, {machine.num_cpus} used"),
            (
                "rates, best of this run",
                f"{machine.gemm_gflops:.0f} GFLOP/s (float32 matrix product, numpy), "
                f"{machine.bandwidth_gb_s:.0f} GB/s (reading memory)",
            ),
            ("other processes", f"{percent(machine.others_share)} of the processors' time"),
            ("energy", machine.energy),
            (
                "measured",
                f"{report.rounds} rounds, a new image in each, {report.expressions} "
                f"expression{'s' if report.expressions > 1 else ''} an image; each bundle in a "
                "process of its own, all asked in turn",
            ),
        ),
        sections=(_times(report), _speedups(report), _machine_use(report), _memory(report)),
        schema_version=SCHEMA_VERSION,
    )


def percent(share: float | None) -> str:
    """A share in whole percent; empty where there is none."""
    return "" if share is None else f"{100 * share:.0f} %"


def milliseconds(spread: Spread | None) -> str:
    """A median with its quartiles, to three digits; empty where there is none."""
    if spread is None:
        return ""
    return f"{_digits(spread.median)} ({_digits(spread.low)} to {_digits(spread.high)})"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _tiles(report: BenchReport) -> tuple[Tile, ...]:
    tiles = [
        Tile(label=f"{row.name} against unpruned", value=f"{row.speedup[TOTAL].median:.2f}x")
        for row in report.rows
        if TOTAL in row.speedup
    ]
    best = min(report.rows, key=lambda row: row.stages[TOTAL].median)
    quickest = f"{best.name}, {_digits(best.stages[TOTAL].median)} ms"
    tiles.append(Tile(label="soonest answer", value=quickest))
    for bundle, backend in report.recommended.items():
        tiles.append(Tile(label=f"for {bundle}", value=f"--backend {backend}"))
    return tuple(tiles)


def _times(report: BenchReport) -> Section:
    present = {name for row in report.rows for name in row.stages}
    columns = {
        words: partial(_stage, name)
        for name, words in {**STAGES, **_AFTER}.items()
        if name in present
    }
    notes = [
        "Median, and in brackets the quartiles, of the samples that count. Image: reading and "
        "scaling it, and the tokenizer; a token: one after the first; one answer: from image and "
        "expression to box. Next answer: of another expression about the same image; prefix: what "
        "of prefill it does not wait for.",
    ]
    if any(row.num_busy for row in report.rows):
        notes.append(
            "Busy: samples during which other processes took more than a tenth of the processors; "
            "they are set aside where enough others are left."
        )
    table = Table.of(
        "milliseconds by stage",
        report.rows,
        {
            "bundle": lambda row: row.name,
            "tokens": lambda row: f"{row.prompt_tokens:.0f}",
            **columns,
            "busy": lambda row: f"{row.num_busy} / {report.rounds}",
        },
        notes=notes,
    )
    figure = Figure(
        caption="Milliseconds of one answer by stage: the medians, which are in the table.",
        draw=partial(draw_times, report.rows),
    )
    return Section(title="Time", tables=(table,), figures=(figure,))


def _stage(name: str, row: BenchRow) -> str:
    return milliseconds(row.stages.get(name))


def _speedups(report: BenchReport) -> Section:
    def ratio(name: str) -> Callable[[BenchRow], str]:
        return lambda row: milliseconds(row.speedup.get(name))

    def of_ideal(row: BenchRow) -> str:
        if row.ideal is None or "prefill" not in row.speedup:
            return ""
        return percent(row.speedup["prefill"].median / row.ideal)

    table = Table.of(
        "times as fast as the unpruned bundle of the same dtype in the same backend",
        [row for row in report.rows if row.speedup],
        {
            "bundle": lambda row: row.name,
            "keep": lambda row: f"{row.keep_ratio:g}",
            "one answer": ratio(TOTAL),
            "tower": ratio("vision_encoder"),
            "prefill": ratio("prefill"),
            "ideal prefill": lambda row: "" if row.ideal is None else f"{row.ideal:.2f}",
            "of ideal": of_ideal,
            "a token": ratio(PER_TOKEN),
        },
        failed=lambda row: any(text.startswith(f"{row.name}: ") for text in report.failures),
        notes=[
            "Of each round by itself; median and quartiles. Ideal: tokens of the unpruned prompt "
            "by those of the pruned one. Attention grows faster than that, so it can be exceeded."
        ],
    )
    return Section(title="Speed-up", tables=(table,))


def _machine_use(report: BenchReport) -> Section:
    energy = any(row.energy_j is not None for row in report.rows)
    table = Table.of(
        "what of the machine is used",
        report.rows,
        {
            "bundle": lambda row: row.name,
            "runs in": lambda row: row.runs,
            "dtype": lambda row: row.dtype,
            "prefill, of GEMM rate": lambda row: percent(row.gemm_share),
            "decode, of bandwidth": lambda row: percent(row.bandwidth_share),
            "CPU ms an answer": lambda row: milliseconds(row.stages.get(CPU)),
            **({"J an answer": lambda row: milliseconds(row.energy_j)} if energy else {}),
        },
        notes=[
            "GEMM rate: a float32 product by numpy, so fewer bits may exceed it. Bandwidth: the "
            "decoder's weights and its cache, read once for a token. On a GPU both say little."
        ],
    )
    return Section(title="Machine", tables=(table,))


def _memory(report: BenchReport) -> Section:
    def mebibytes(size: int) -> str:
        return f"{size / _MIB:,.0f}"

    table = Table.of(
        "memory of the process in MiB, and milliseconds until it is ready",
        report.rows,
        {
            "bundle": lambda row: row.name,
            "peak": lambda row: mebibytes(row.memory.peak),
            "steady": lambda row: mebibytes(row.memory.steady),
            "its own": lambda row: mebibytes(row.memory.own),
            "open, first time": lambda row: _digits(row.open_ms[0]),
            "open again": lambda row: _digits(row.open_ms[1]),
            "first answer": lambda row: _digits(row.first_call_ms),
        },
        notes=[
            "Python and imports included. Its own: what the system cannot drop and read from a "
            "file again. Memory of a GPU is not in it."
        ],
    )
    return Section(title="Memory and start", tables=(table,))
