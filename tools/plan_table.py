#!/usr/bin/env python3
"""Hold what plan predicts against what is measured.

    tools/plan_table.py --measure BUNDLE...     measures bundles, in one thread of this CPU, and
                                                keeps the figures in docs/results/plan.json
    tools/plan_table.py --write                 puts the tables of those figures into docs/results

Each stage's least processor time counts, since a shared machine delays wall time. The CPU is
calibrated on the bundles named by ``--calibrate``; the others are what the prediction is judged by.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from pages import DOCS, note, publish
from plan_bench.measured import measure_bundle

from gap_export.planning.calibrate import STAGES, Point, fit_points, points_of_bundle
from gap_export.planning.devices import Device, cpu_of, find_device
from gap_export.planning.estimate import answer_times, memory_of, roofline_s
from gap_export.planning.model import PlannedModel, cache_bytes_a_token, weights_of
from gap_export.planning.results import DECODE, PREFILL
from gap_export.spec.requests import PruningRequest

KEPT = DOCS / "results" / "plan.json"
CALIBRATED_ON = ["refshapes-llava-1-float32", "refshapes-llava-1-int4"]
# TensorRT Edge-LLM on Jetson AGX Orin 64 GB, INT4, a prompt of 292 tokens: milliseconds of prefill,
# tokens a second, GB in all, as its authors publish them.
PUBLISHED = {"qwen3-vl-8b": (178.0, 32.0, 9.0), "qwen3-vl-4b": (106.0, 55.0, 6.1)}
_PROMPT = 292


def main(
    measure: Annotated[list[Path] | None, typer.Option()] = None,
    calibrate: Annotated[list[str], typer.Option()] = CALIBRATED_ON,
    shape: Annotated[str | None, typer.Option(help="Folder of tools/write_shape.py.")] = None,
    write: bool = False,
) -> None:
    """Measure, or print the tables."""
    rows: list[dict[str, Any]] = json.loads(KEPT.read_text()) if KEPT.is_file() else []
    for path in measure or ():
        note(f"measuring {path}")
        rows = [row for row in rows if row["bundle"] != path.name]
        rows.append(measure_bundle(path))
        KEPT.write_text(json.dumps(rows, indent=1) + "\n")
    if not measure:
        publish("plan-cpu", _cpu_table(rows, calibrate, shape), write=write)
        publish("plan-published", _published_table(), write=write)


def _cpu_table(rows: list[dict[str, Any]], calibrate: list[str], shape: str | None) -> str:
    device = cpu_of(max(row["gemm"] for row in rows), max(row["bandwidth"] for row in rows), 1)
    points = {row["bundle"]: _points(row, device, shape) for row in rows}
    calibrate = [name for name in calibrate if name in points]
    fits = fit_points([point for name in calibrate for point in points[name]])
    lines = [
        f"`tools/plan_table.py`: {device.tera_operations['float32'] * 1e3:.0f} GFLOP/s and "
        f"{device.bandwidth_gb_s:.0f} GB/s, measured in the same runs; milliseconds",
        "",
        "| bundle | tokens | tower: measured, predicted | prefill | a token | |",
        "|---|---|---|---|---|---|",
    ]
    errors: dict[str, list[float]] = {}
    for row in rows:
        cells = []
        for point in points[row["bundle"]]:
            fit = fits.get(f"{point.stage} {point.dtype}")
            if fit is None:
                cells.append(f"{point.measured_ms:.3g}, not calibrated")
                continue
            predicted = point.predict(fit)
            error = predicted / point.measured_ms - 1
            if row["bundle"] not in calibrate:
                errors.setdefault(point.stage, []).append(abs(error))
            cells.append(f"{point.measured_ms:.3g}, {predicted:.3g} ({100 * error:+.0f} %)")
        label = "calibrated on" if row["bundle"] in calibrate else "predicted"
        lines.append(
            f"| {row['bundle']} | {row['prompt_tokens']} | {' | '.join(cells)} | {label} |"
        )
    every = [one for found in errors.values() for one in found]
    lines += [
        "",
        f"Of the {len(rows) - len(calibrate)} bundles that nothing was calibrated on, "
        f"{len(every)} stages: median error {100 * median(every):.0f} %, worst "
        f"{100 * max(every):.0f} % ("
        + ", ".join(
            f"{stage} {100 * median(found):.0f} and {100 * max(found):.0f} %"
            for stage, found in errors.items()
        )
        + ").",
    ]
    return "\n".join(lines)


def _points(row: dict[str, Any], device: Device, shape: str | None) -> list[Point]:
    return points_of_bundle(
        shape if shape is not None and row["model"].endswith("-shape") else row["model"],
        device,
        row=row["bundle"],
        request=PruningRequest(keep_ratio=row["keep_ratio"], pruner=row["pruner"]),
        dtype="int4" if row["int4"] else row["floats"],
        floats=row["floats"],
        prompt_tokens=row["prompt_tokens"],
        answer_tokens=row["answer_tokens"],
        measured_ms={stage: row["stages"][name] for stage, name in STAGES.items()},
    )


def _published_table() -> str:
    device = find_device("agx-orin-64gb")
    lines = [
        "`tools/plan_table.py`",
        "",
        "| Jetson AGX Orin 64 GB, INT4, 292 tokens | prefill: published, predicted (range) ms | "
        "tokens a second | GB | share of compute, of bandwidth that the figures imply |",
        "|---|---|---|---|---|",
    ]
    for name, (milliseconds, speed, memory) in PUBLISHED.items():
        model = PlannedModel(name, answer_tokens=32, prompt_tokens=_PROMPT)
        work = model.work(PruningRequest(keep_ratio=1.0))
        weights = weights_of(work, "int4", "float16")
        times = answer_times(work.costs, weights, device, answer_tokens=32)
        held = memory_of(
            work.costs,
            weights,
            device,
            cache_bytes_a_token=cache_bytes_a_token(work),
            prompt_tokens=_PROMPT,
            new_tokens=128,
        )["total"]
        prefill, token = times[PREFILL], times[DECODE]
        ideal = [1e3 * roofline_s(work.costs[one], weights, device) for one in (PREFILL, DECODE)]
        lines.append(
            f"| {name} | {milliseconds:g}, {prefill.likely:.0f} ({prefill.low:.0f} to "
            f"{prefill.high:.0f}) | {speed:g}, {1e3 / token.likely:.0f} ({1e3 / token.high:.0f} to "
            f"{1e3 / token.low:.0f}) | {memory:g}, {held.low / 1e9:.1f} to {held.high / 1e9:.1f} | "
            f"{100 * ideal[0] / milliseconds:.0f} %, {100 * ideal[1] * speed / 1e3:.0f} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
