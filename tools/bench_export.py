#!/usr/bin/env python3
"""Export a LLaVA-1.5-7B of true shape: wall time, peak memory, new bytes on disk.

    tools/bench_export.py                   under build/bench-export, 13.5 GB
    tools/bench_export.py --work DIR        elsewhere; a checkpoint found there is used again
    tools/bench_export.py --no-rival        leave torch.onnx.export out
    tools/bench_export.py --write           put the table into docs/results
    tools/bench_export.py --model qwen3-vl-4b    a Qwen3-VL in its place, 8.9 GB: our export alone

Prints a Markdown table and exits with 1 where the export misses a bar. The rival's figures at 32
layers are a straight line through those at fewer layers, and marked so.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import typer
from export_bench.checkpoint import write_checkpoint
from export_bench.measured import Measured, measure
from export_bench.ours import RECIPE, new_bytes
from export_bench.qwen import write_qwen
from pages import ROOT, called_as, note, publish

BAR_SECONDS, BAR_PEAK, BAR_NEW = 60.0, 2e9, 100e6
RIVAL_LAYERS = (2, 4, 8)
TRUE_LAYERS = 32
_PROOF_LAYERS, _PROOF_TOKENS = 2, 64


def main(
    work: Path = ROOT / "build" / "bench-export",
    rival: bool = True,
    write: bool = False,
    model: str = RECIPE,
) -> None:
    """Measure and print."""
    if model != RECIPE:
        sys.exit(measure_qwen(work, model, write=write))
    checkpoint, bundle = work / "llava-1.5-7b-random", work / "bundle"
    note("writing the checkpoint, 13.5 GB" if write_checkpoint(checkpoint) else "checkpoint there")
    tokenizer = checkpoint / "tokenizer.json"
    if not tokenizer.is_file():
        measure("export_bench.tokenizer", "write_tokenizer", path=str(tokenizer))
    note("exporting")
    ours = measure("export_bench.ours", "export", checkpoint=str(checkpoint), out=str(bundle))
    fresh = new_bytes(bundle, checkpoint)
    note(f"steps, s: {ours.value['seconds']}")
    note("proving the references")
    proof = measure(
        "export_bench.ours",
        "prove",
        checkpoint=str(checkpoint),
        bundle=str(bundle),
        num_layers=_PROOF_LAYERS,
        num_tokens=_PROOF_TOKENS,
    ).value
    note("running it")
    answer = measure("export_bench.ours", "answer", bundle=str(bundle)).value
    rivals: dict[int, Measured] = {}
    for layers in RIVAL_LAYERS if rival else ():
        note(f"torch.onnx.export of {layers} layers")
        rivals[layers] = measure(
            "export_bench.rival", "export_plain", num_layers=layers, scratch=str(work)
        )
    text = report(ours, fresh, rivals, proof, answer)
    publish("export", text, write=write)
    missed = ours.seconds > BAR_SECONDS or ours.peak_bytes > BAR_PEAK or fresh > BAR_NEW
    # Sums of float16 products in another order: a hundredth of the largest logit is far above that.
    wrong = not proof["max_abs_diff"] < 0.01 * proof["max_abs_logit"]
    sys.exit(int(missed or wrong))


def measure_qwen(work: Path, model: str, *, write: bool) -> int:
    """The export of a Qwen3-VL alone; 1 where it misses a bar."""
    checkpoint, bundle = work / f"{model}-random", work / f"{model}-bundle"
    note("writing the checkpoint" if write_qwen(checkpoint, model) else "checkpoint there")
    ours = measure(
        "export_bench.ours", "export", checkpoint=str(checkpoint), out=str(bundle), recipe=model
    )
    fresh = new_bytes(bundle, checkpoint)
    note(f"steps, s: {ours.value['seconds']}")
    lines = [
        f"`{called_as('bench_export.py')}`, two CPU cores, random weights of true shape:",
        "",
        "| | wall time | peak memory | new bytes on disk |",
        "|---|---|---|---|",
        row(f"gap-export, {model}", ours.seconds, ours.peak_bytes, fresh),
    ]
    publish("export-qwen3-vl", "\n".join(lines), write=write)
    return int(ours.seconds > BAR_SECONDS or ours.peak_bytes > BAR_PEAK or fresh > BAR_NEW)


def report(
    ours: Measured,
    fresh: int,
    rivals: dict[int, Measured],
    proof: dict[str, float],
    answer: dict[str, float],
) -> str:
    """The table as Markdown."""
    lines = [
        "`tools/bench_export.py`, two CPU cores, LLaVA-1.5-7B of true shape in float16, 13.5 GB:",
        "",
        "| | wall time | peak memory | new bytes on disk |",
        "|---|---|---|---|",
        row("gap-export, the whole model", ours.seconds, ours.peak_bytes, fresh),
    ]
    lines += [
        row(f"torch.onnx.export, {n} decoder layers", m.seconds, m.peak_bytes, m.value)
        for n, m in rivals.items()
    ]
    if rivals:
        at = [
            extrapolate({n: value(m) for n, m in rivals.items()})
            for value in (
                lambda m: m.seconds,
                lambda m: m.peak_bytes,
                lambda m: m.value,
            )
        ]
        lines.append(row(f"torch.onnx.export, {TRUE_LAYERS} layers, extrapolated", *at))
    lines += [
        "",
        f"The bundle's decoder, cut to its first {_PROOF_LAYERS} layers, in ONNX Runtime against "
        f"transformers in float32, one prefill of {_PROOF_TOKENS} tokens: logits differ by at most "
        f"{proof['max_abs_diff']:.1e}, the largest being {proof['max_abs_logit']:.2f}.",
        "",
        "The whole bundle answers in ONNX Runtime on the CPU with "
        f"{answer['own_bytes'] / 1e9:.1f} GB of memory of its own; the weights stay mapped from "
        "their files, so less memory than they take is enough (prefill at keep 0.3: "
        f"{answer['prefill'] / 1e3:.0f} s).",
    ]
    return "\n".join(lines)


def row(name: str, seconds: float, peak: float, fresh: float) -> str:
    """One row; decimal units."""
    size = f"{fresh / 1e9:.1f} GB" if fresh >= 1e9 else f"{fresh / 1e6:.1f} MB"
    return f"| {name} | {seconds:.0f} s | {peak / 1e9:.1f} GB | {size} |"


def extrapolate(by_layers: dict[int, float]) -> float:
    """The value at the true depth of the straight line through those measured."""
    slope, intercept = np.polyfit(list(by_layers), list(by_layers.values()), 1)
    return float(slope * TRUE_LAYERS + intercept)


if __name__ == "__main__":
    typer.run(main)
