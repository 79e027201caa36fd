#!/usr/bin/env python3
"""Build the engines of a LLaVA-1.5-7B of true shape, INT4 and float16: memory, time, plan size.

    tools/bench_engines.py                    under build/, needs 50 GB of disk, half an hour
    tools/bench_engines.py --only int4        one of the rows alone: int4, fp16, streamed, stripped
    tools/bench_engines.py --write            put the tables into docs/results

The checkpoint of random weights is that of tools/bench_export.py, and made where it is missing.
Export and build are processes of their own; bundles and engines are removed when measured. Needs
no GPU. Prints Markdown, what is refused or does not fit with its message, and exits with 1 where
INT4 misses a bar. What the float16 decoder takes is measured at fewer layers, too: its figures at
32 are a straight line through those, and marked so.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from engine_bench.export import QUANTIZING
from engine_bench.watch import Watched, watch
from export_bench.checkpoint import write_checkpoint
from export_bench.measured import Measured, measure
from export_bench.ours import RECIPE, new_bytes
from pages import ROOT, called_as, note, publish

from gap_export.bundle import open_bundle
from gap_export.spec.manifest import EngineLimits

TARGET, KEEP_RATIO, BLOCK_SIZE = "rtx:sm89", 0.3, 128
DECODER, CUT_LAYERS, TRUE_LAYERS = "decoder_model_merged", (2, 4, 8), 32
BAR_QUANTIZING, BAR_BUILDING = 4e9, 24 * (1 << 30)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row of the benchmark.

    Attributes:
        title: In the tables.
        block_size: Weights of INT4 that share a scale; None for float16.
        weights: The value of ``gap-export build --weights``.
    """

    title: str
    block_size: int | None
    weights: str


CASES = {
    "int4": Case(title="INT4", block_size=BLOCK_SIZE, weights="included"),
    "fp16": Case(title="float16", block_size=None, weights="included"),
    "streamed": Case(title="float16, weights streamed", block_size=None, weights="streamed"),
    "stripped": Case(title="float16, stripped plan", block_size=None, weights="stripped"),
}


@dataclass(frozen=True, kw_only=True)
class Export:
    """A bundle that was measured, and is gone.

    Attributes:
        took: The export's process; its value has the stages.
        new_bytes: Bytes that the bundle takes beside the checkpoint.
        limits: The sizes engines are built for.
    """

    took: Measured
    new_bytes: int
    limits: EngineLimits


def main(
    work: Path = ROOT / "build" / "bench-export",
    scratch: Path = ROOT / "build" / "bench-engines",
    only: Annotated[list[str] | None, typer.Option(metavar="ROW")] = None,
    write: bool = False,
) -> None:
    """Measure and print."""
    unknown = set(only or ()) - CASES.keys()
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)} is none of {', '.join(CASES)}")
    cases = [case for name, case in CASES.items() if not only or name in only]
    checkpoint = work / "llava-1.5-7b-random"
    note("writing the checkpoint, 13.5 GB" if write_checkpoint(checkpoint) else "checkpoint there")
    tokenizer = checkpoint / "tokenizer.json"
    if not tokenizer.is_file():
        measure("export_bench.tokenizer", "write_tokenizer", path=str(tokenizer))
    exports: dict[int | None, Export] = {}
    builds: dict[str, Watched] = {}
    for block_size in dict.fromkeys(case.block_size for case in cases):
        bundle = scratch / "bundle"
        exports[block_size] = export(checkpoint, bundle, block_size)
        for case in (case for case in cases if case.block_size == block_size):
            note(f"building {case.title}")
            builds[case.title] = watch(build_command(bundle, case))
            note(f"exit code {builds[case.title].exit_code} {builds[case.title].message}")
            shutil.rmtree(bundle / "engines", ignore_errors=True)
        shutil.rmtree(bundle)
    cuts = build_cuts(scratch / "cut") if CASES["fp16"] in cases else {}
    text = report(exports, cuts, {case.title: (case, builds[case.title]) for case in cases})
    publish("engines", text, write=write)
    sys.exit(int(any(misses_bar(case, exports, builds[case.title]) for case in cases)))


def export(checkpoint: Path, bundle: Path, block_size: int | None) -> Export:
    """Export, in a process of its own, up to the first engine."""
    note(f"exporting {name_of(block_size)}")
    took = measure(
        "engine_bench.export",
        "export",
        checkpoint=str(checkpoint),
        out=str(bundle),
        recipe=RECIPE,
        keep_ratio=KEEP_RATIO,
        target=TARGET,
        block_size=block_size,
    )
    note(f"stages: {took.value}")
    limits = open_bundle(bundle).manifest.engine_limits
    assert limits is not None
    return Export(took=took, new_bytes=new_bytes(bundle, checkpoint), limits=limits)


def build_cuts(bundle: Path) -> dict[int, Watched]:
    """The float16 decoder of fewer layers, by their number."""
    cuts: dict[int, Watched] = {}
    for num_layers in CUT_LAYERS:
        note(f"building {num_layers} layers")
        measure(
            "engine_bench.export",
            "export_cut",
            out=str(bundle),
            recipe=RECIPE,
            keep_ratio=KEEP_RATIO,
            target=TARGET,
            num_layers=num_layers,
        )
        build = watch([*build_command(bundle, CASES["fp16"]), "--only", DECODER])
        if build.exit_code != 0:
            raise RuntimeError(f"{num_layers} layers were not built: {build.message}")
        cuts[num_layers] = build
        shutil.rmtree(bundle)
    return cuts


def build_command(bundle: Path, case: Case) -> list[str]:
    """``gap-export build``, as a user would call it."""
    command = [sys.executable, "-m", "gap_export", "build", str(bundle), "--target", TARGET]
    return [*command, "--weights", case.weights, "--json", "-q"]


def misses_bar(case: Case, exports: dict[int | None, Export], build: Watched) -> bool:
    """Whether INT4 takes more memory than it may, or was not built; float16 has no bar."""
    if case.block_size is None:
        return False
    quantizing = exports[case.block_size].took.value[QUANTIZING]["peak_bytes"]
    return (
        quantizing >= BAR_QUANTIZING
        or exports[case.block_size].took.peak_bytes >= BAR_QUANTIZING
        or build.exit_code != 0
        or build.peak_bytes > BAR_BUILDING
    )


def report(
    exports: dict[int | None, Export],
    cuts: dict[int, Watched],
    builds: dict[str, tuple[Case, Watched]],
) -> str:
    """The tables as Markdown; decimal units."""
    limits = next(iter(exports.values())).limits
    lines = [
        f"`{called_as('bench_engines.py')}`, {machine()}, no GPU; LLaVA-1.5-7B of true shape, "
        f"random weights, 13.5 GB in float16, keep {KEEP_RATIO:g}, for SM 89 (fused; prompts up to "
        f"{limits.max_prompt} tokens, answers up to {limits.max_new_tokens}, one row):",
        "",
        "| export | wall time | of it quantizing | peak memory, quantizing | peak memory, all "
        "| new bytes on disk |",
        "|---|---|---|---|---|---|",
        *(export_row(block_size, measured) for block_size, measured in exports.items()),
        "",
        "| build | engine | plan | time | peak memory |",
        "|---|---|---|---|---|",
    ]
    refused = []
    for title, (_, build) in builds.items():
        if build.exit_code == 0:
            lines += build_rows(title, build)
        else:
            lines.append(f"| {title} | none | | {build.seconds:.0f} s | {memory_of(build)} |")
            refused.append(f"- {title}: {build.message or f'ended by {build.exit_code}'}")
    lines += cut_rows(cuts) if cuts else []
    lines += [
        "",
        "Peak memory counts pages of weight files that are mapped, which the system can drop and "
        "read again; *own* is what it cannot.",
    ]
    if cuts:
        lines[-1] += (
            " TensorRT-RTX holds float16 weights of layers with a common input (q, k, v; gate, up) "
            "in two layouts where prefill and decode have a profile each; INT4 weights it holds "
            "once."
        )
    if refused:
        lines += ["", "Not built:", "", *refused]
    return "\n".join(lines)


def export_row(block_size: int | None, measured: Export) -> str:
    """One row of the export's table."""
    took = measured.took
    stage = took.value.get(QUANTIZING)
    quantizing = ["", ""]
    if stage is not None:
        quantizing = [f"{stage['seconds']:.0f} s", gb(stage["peak_bytes"])]
    cells = [name_of(block_size), f"{took.seconds:.0f} s", *quantizing]
    return f"| {' | '.join([*cells, gb(took.peak_bytes), gb(measured.new_bytes)])} |"


def build_rows(title: str, build: Watched) -> list[str]:
    """A row for each engine, and one for all."""
    engines: list[dict[str, Any]] = json.loads(build.stdout)
    rows = [
        f"| {title} | {engine['component']} | {gb(engine['size_bytes'])} "
        f"| {engine['build_seconds']:.0f} s | {gb(engine['peak_memory_bytes'])} |"
        for engine in engines
    ]
    total = sum(engine["size_bytes"] for engine in engines)
    return [
        *rows,
        f"| {title} | **all** | **{gb(total)}** | **{build.seconds:.0f} s** "
        f"| **{memory_of(build)}** |",
    ]


def cut_rows(cuts: dict[int, Watched]) -> list[str]:
    """A row for each depth, and one for the true depth, extrapolated."""
    figures = {
        layers: (
            float(json.loads(build.stdout)[0]["size_bytes"]),
            build.seconds,
            float(build.peak_bytes),
            float(build.anonymous_bytes),
        )
        for layers, build in cuts.items()
    }
    lines = np.polyfit(list(figures), list(figures.values()), 1)
    rows = {f"{layers} decoder layers": row for layers, row in figures.items()}
    rows[f"{TRUE_LAYERS} layers, extrapolated"] = tuple(lines[0] * TRUE_LAYERS + lines[1])
    return [
        f"| float16, {name} | {DECODER} | {gb(plan)} | {seconds:.0f} s "
        f"| {gb(peak)}, own {gb(own)} |"
        for name, (plan, seconds, peak, own) in rows.items()
    ]


def memory_of(build: Watched) -> str:
    """Of the whole process."""
    return f"{gb(build.peak_bytes)}, own {gb(build.anonymous_bytes)}"


def name_of(block_size: int | None) -> str:
    """A dtype of weights, as the tables have it."""
    return "float16" if block_size is None else f"INT4, blocks of {block_size}"


def machine() -> str:
    """What it was measured on, and with what."""
    from gap_export.engines.library import library_for
    from gap_export.engines.targets import parse_targets

    (choice,) = parse_targets([TARGET])
    library = library_for(choice.target)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    cores = os.cpu_count()
    return f"{library.name} {library.version}, {cores} CPU cores, {memory:.0f} GiB of memory"


def gb(size: float) -> str:
    """Decimal units."""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


if __name__ == "__main__":
    typer.run(main)
