"""A plan as a document: its words and tables."""

from __future__ import annotations

from functools import partial

from gap_export.planning.results import (
    DECODE,
    PREFILL,
    SCHEMA_VERSION,
    TOWER,
    Configuration,
    Estimate,
    PlanReport,
)
from gap_export.report.document import Document, Figure, Section, Table, Tile
from gap_export.report.figures.fronts import draw_front
from gap_export.visible import clean, visible_strings

_GB = 1e9


def document_of_plan(report: PlanReport) -> Document:
    """What a plan says, for people."""
    report = visible_strings(report, show=clean)
    facts, best = report.device_facts, report.best
    rates = ", ".join(f"{rate:g} {name}" for name, rate in facts["tera_operations"].items())
    budget = f"{report.memory_bytes / _GB:.1f} GB"
    if report.latency_ms is not None:
        budget = f"{report.latency_ms:g} ms, {budget}"
    if best is not None:
        tiles: tuple[Tile, ...] = (
            Tile(label="an answer, likely", value=f"{digits(best.latency_ms.likely)} ms"),
            Tile(label="memory, at most", value=f"{best.memory_bytes.high / _GB:.1f} GB"),
            Tile(label="export", value=best.command),
        )
        problems: tuple[str, ...] = ()
    else:
        tiles = (Tile(label="nothing meets the budget", value=describe_nearest(report)),)
        problems = (f"nothing meets the budget: {describe_nearest(report)}",)
    return Document(
        command="plan",
        title=f"{report.model} on {facts['title']}",
        status="passed" if best is not None else "failed",
        lead="; ".join(f"{tile.label}: {tile.value}" for tile in tiles),
        tiles=tiles,
        problems_title="Budget",
        problems=problems,
        facts=(
            ("device", f"{report.device}: {facts['memory_gb']:.3g} GB, "
             f"{facts['bandwidth_gb_s']:.4g} GB/s, 1e12 operations a second: {rates}"),
            ("its source", str(facts["source"])),
            ("what of that is reached", _reached(report)),
            ("what runs there", str(facts["software"])),
            ("budget", budget),
            ("asked", f"{report.text_tokens} tokens of text beside the visual ones, an answer of "
             f"{report.answer_tokens}"),
        ),
        sections=(_front(report), _memory(report), _all(report)),
        schema_version=SCHEMA_VERSION,
    )  # fmt: skip


def describe_nearest(report: PlanReport) -> str:
    """What comes nearest to a budget that nothing meets."""
    one = report.nearest
    assert one is not None, "something was looked at"
    what = f"keep {one.keep_ratio:g}, {one.dtype}: {digits(one.latency_ms.likely)} ms, "
    what += f"{one.memory_bytes.high / _GB:.1f} GB"
    if one.fits:
        return f"the quickest that fits is {what}"
    return f"the smallest is {what} of {report.memory_bytes / _GB:.1f} GB"


def digits(value: float) -> str:
    """Three digits of a number above 0."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _reached(report: PlanReport) -> str:
    facts = report.device_facts
    if facts["fits"]:
        return "as measured: " + ", ".join(
            f"{name} {100 * fit['share']:.0f} %" for name, fit in facts["fits"].items()
        )
    shares = [
        f"{name} {', '.join(f'{100 * one:.0f}' for one in facts['reached'][name])} %"
        for name in ("compute", "bandwidth")
    ]
    return f"least, likely, most: {'; '.join(shares)} ({facts['reached']['source']})"


def _range(one: Estimate) -> str:
    return f"{digits(one.likely)} ({digits(one.low)} to {digits(one.high)})"


def _gigabytes(one: Estimate) -> str:
    return f"{one.low / _GB:.2f} to {one.high / _GB:.2f}"


def _accuracy(one: Configuration) -> str:
    if one.accuracy is None:
        return ""
    low, high = one.accuracy.interval
    return f"{100 * one.accuracy.acc_at_50:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _budget(one: Configuration) -> str:
    return "meets" if one.meets else "late" if one.fits else "does not fit"


_COLUMNS = {
    "keep": lambda one: f"{one.keep_ratio:g}",
    "pruner": lambda one: one.pruner,
    "dtype": lambda one: one.dtype,
    "canvas": lambda one: f"{one.canvas[0]}x{one.canvas[1]}",
    "tokens": lambda one: str(one.prompt_tokens),
    "tower": lambda one: digits(one.times[TOWER].likely),
    "prefill": lambda one: digits(one.times[PREFILL].likely),
    "a token": lambda one: digits(one.times[DECODE].likely),
    "answer": lambda one: _range(one.latency_ms),
    "GB": lambda one: _gigabytes(one.memory_bytes),
    "Acc@0.5 %": _accuracy,
    "budget": _budget,
}


def _front(report: PlanReport) -> Section:
    some = sorted(
        (one for one in report.configurations if one.on_front),
        key=lambda one: -one.latency_ms.likely,
    )
    table = Table.of(
        "no other is at least as good in time, memory and accuracy (milliseconds, likely)",
        some,
        _COLUMNS,
        failed=lambda one: not one.meets,
        notes=report.notes,
    )
    figure = Figure(
        caption="Likely time of an answer against most memory; filled points are on the front.",
        draw=partial(
            draw_front, report.configurations, report.latency_ms, report.memory_bytes
        ),
    )  # fmt: skip
    return Section(title="What to choose from", tables=(table,), figures=(figure,))


def _memory(report: PlanReport) -> Section:
    one = report.best or report.nearest
    assert one is not None
    table = Table.of(
        f"GB of keep {one.keep_ratio:g}, {one.dtype}",
        list(one.memory.items()),
        {
            "part": lambda part: part[0].replace("_", " "),
            "GB": lambda part: _gigabytes(part[1]),
            "rests on": lambda part: part[1].basis,
        },
    )
    return Section(title="Memory", tables=(table,))


def _all(report: PlanReport) -> Section:
    table = Table.of(
        "all that was looked at", report.configurations, _COLUMNS, is_long=True,
        failed=lambda one: not one.meets,
    )  # fmt: skip
    return Section(title="Everything", tables=(table,))
