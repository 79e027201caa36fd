#!/usr/bin/env python3
"""Prefill and decode latency of bundles on this machine's GPU: what keeping fewer tokens buys.

    gap-export MODEL --keep 1.0 --trt --out k100
    gap-export MODEL --keep 0.5 --trt --out k50
    gap-export MODEL --keep 0.3 --trt --out k30
    tools/bench_tensorrt.py k100 k50 k30              to build/bench-tensorrt/, .json and .md
    tools/bench_tensorrt.py k100 k50 k30 --with-cpu   ONNX Runtime's CPU provider as well

Tries TensorRT, TensorRT with CUDA graphs, onnxruntime-gpu and PyTorch, in this order, and writes
down what happened with each, a refusal as well. The decoder alone is measured: B = 1, random
embeddings, logits brought back to the host after each step. Medians.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import typer
from tensorrt_bench.runners import GPU_RUNNERS, Runner, onnxruntime_cpu
from tensorrt_bench.timing import Latency, Workload, measure

from gap_export.bundle import open_bundle
from gap_export.errors import GapExportError
from gap_export.runtime.backends.device import CudaDevice
from gap_export.version import __version__

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Row:
    """One bundle with one runner.

    Attributes:
        runner: Which of those tried.
        name: What ran, with version and device; empty where it did not.
        bundle: Its folder's name.
        model: Recipe.
        keep_ratio: The share of tokens that the bundle keeps.
        num_prompt_tokens: P.
        latency: None where it was refused.
        refusal: Why.
    """

    runner: str
    name: str
    bundle: str
    model: str
    keep_ratio: float
    num_prompt_tokens: int
    latency: Latency | None
    refusal: str


def main(
    bundles: list[Path],
    out: Path = ROOT / "build" / "bench-tensorrt",
    text_tokens: int = 59,
    new_tokens: int = 20,
    warm_ups: int = 5,
    runs: int = 20,
    with_cpu: bool = False,
) -> None:
    """Measure, print, write."""
    runners = (*GPU_RUNNERS, onnxruntime_cpu) if with_cpu else GPU_RUNNERS
    rows = []
    for runner in runners:
        for bundle in bundles:
            manifest = open_bundle(bundle).manifest
            workload = Workload.of(manifest, num_text_tokens=text_tokens, num_new_tokens=new_tokens)
            print(f"{runner.__name__}: {bundle}", file=sys.stderr, flush=True)
            name, latency, refusal = try_one(runner, bundle, workload, warm_ups, runs)
            rows.append(
                Row(
                    runner=runner.__name__,
                    name=name,
                    bundle=bundle.name,
                    model=manifest.model.name,
                    keep_ratio=manifest.pruning.keep_ratio,
                    num_prompt_tokens=workload.num_prompt_tokens,
                    latency=latency,
                    refusal=refusal,
                )
            )
    text = report(rows)
    print(text)
    out.mkdir(parents=True, exist_ok=True)
    facts = {"machine": machine(), "command": sys.argv, "rows": [asdict(row) for row in rows]}
    (out / "bench_tensorrt.json").write_text(json.dumps(facts, indent=2) + "\n")
    (out / "bench_tensorrt.md").write_text(text + "\n")


def try_one(
    runner: Runner, bundle: Path, workload: Workload, warm_ups: int, runs: int
) -> tuple[str, Latency | None, str]:
    """The runner's name and latency, or why there is none."""
    name = ""
    try:
        with runner(bundle) as (name, decoder):
            return name, measure(decoder, workload, warm_ups=warm_ups, runs=runs), ""
    except (GapExportError, ImportError, RuntimeError) as err:
        # What others refuse is a finding here. PyTorch's errors, out of memory included, are
        # RuntimeErrors.
        first = (str(err).splitlines() or [""])[0]
        return name, None, f"{type(err).__name__}: {first}"


def machine() -> dict[str, str]:
    """What it was measured on."""
    try:
        device = CudaDevice()
        gpu = f"{device.name}, SM {device.compute_capability}"
    except GapExportError as err:
        gpu = f"none: {err.what}"
    return {"gpu": gpu, "platform": platform.platform(), "gap_export": __version__}


def report(rows: list[Row]) -> str:
    """The table as Markdown; each ratio is to the same runner's bundle that keeps most."""
    lines = [
        f"`tools/bench_tensorrt.py` on {machine()['gpu']}; decoder, one row, medians:",
        "",
        "| what ran | keep | prompt | prefill ms | ratio | decode ms/token | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    refusals = []
    for row in rows:
        if row.latency is None:
            refusals.append(f"- {row.runner}, {row.bundle}: {row.refusal}")
            continue
        base = max(
            (other for other in rows if other.runner == row.runner and other.latency is not None),
            key=lambda other: other.keep_ratio,
        ).latency
        assert base is not None
        latency = row.latency
        lines.append(
            f"| {row.name} | {row.keep_ratio:g} | {row.num_prompt_tokens} | "
            f"{latency.prefill_ms:.2f} | {latency.prefill_ms / base.prefill_ms:.2f} | "
            f"{latency.decode_ms:.2f} | {latency.decode_ms / base.decode_ms:.2f} |"
        )
    if refusals:
        lines += ["", "Did not run:", "", *refusals]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
