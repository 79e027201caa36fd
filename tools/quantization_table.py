#!/usr/bin/env python3
"""Acc@0.5 of the demo model in float32, float16 and INT4, GAP on.

    tools/quantization_table.py                     prints the table, some minutes on two cores
    tools/quantization_table.py --samples 200       quicker and coarser
    tools/quantization_table.py --write             puts it into docs/results

All rows answer the same held-out questions in ONNX Runtime. AWQ is calibrated with images of the
training split.
"""

from __future__ import annotations

from typing import Literal

import typer
from pages import DEMO_MODEL, called_as, interval, note, percent, publish

from gap_export.evaluation.evaluate import evaluate_model
from gap_export.evaluation.refshapes import calibration_questions
from gap_export.evaluation.results import SettingRow
from gap_export.exporting import Dtype, ExportOptions
from gap_export.spec.manifest import QuantizationSpec
from gap_export.spec.requests import PruningRequest

# The decoder is 160 wide, which 32 divides alone.
BLOCK_SIZE = 32
KEEP_RATIO = 0.3
Method = Literal["rtn", "awq"]
ROWS: dict[str, tuple[Dtype, Method | None]] = {
    "float32": ("float32", None),
    "float16": ("float16", None),
    "INT4, rounded to nearest": ("float32", "rtn"),
    "INT4, AWQ": ("float32", "awq"),
}


def main(samples: int = 2000, seed: int = 0, pruner: str = "spatial", write: bool = False) -> None:
    """Measure and print."""
    table = render(
        {
            name: measure(dtype, method, samples=samples, seed=seed, pruner=pruner)
            for name, (dtype, method) in ROWS.items()
        },
        pruner=pruner,
    )
    publish("quantization", f"`{called_as('quantization_table.py')}`\n\n{table}", write=write)


def measure(
    dtype: Dtype, method: Method | None, *, samples: int, seed: int, pruner: str
) -> tuple[SettingRow, SettingRow]:
    """The unpruned row and the GAP row of one form of the weights."""
    note(f"measuring {method or dtype}")
    options = ExportOptions(
        model=DEMO_MODEL,
        pruning=PruningRequest(pruner=pruner, keep_ratio=KEEP_RATIO, seed=seed),
        dtype=dtype,
        quantization=None if method is None else int4(method),
        calibration=tuple(calibration_questions()) if method == "awq" else None,
    )
    report = evaluate_model(options, num_samples=samples)
    (unpruned,) = [row for row in report.rows if row.positions == "none"]
    (gap,) = [row for row in report.rows if row.positions == "gap"]
    return unpruned, gap


def int4(method: Method) -> QuantizationSpec:
    """The decoder's linear layers, not its LM head."""
    return QuantizationSpec(dtype="int4", block_size=BLOCK_SIZE, method=method, lm_head=False)


def render(rows: dict[str, tuple[SettingRow, SettingRow]], *, pruner: str) -> str:
    """The table in Markdown."""
    first, _ = next(iter(rows.values()))
    lines = [
        f"{first.n} held-out expressions on {first.num_images} images, greedy; pruner {pruner}, "
        f"keep {KEEP_RATIO:g}, GAP. INT4: the decoder's linear layers, in blocks of {BLOCK_SIZE}.",
        "",
        "| weights | unpruned | pruned, GAP | 95 % interval | of float32, pruned |",
        "|---|---|---|---|---|",
    ]
    whole = next(iter(rows.values()))[1].acc_at_50
    lines += [
        f"| {name} | {percent(unpruned.acc_at_50)} | **{percent(gap.acc_at_50)}** "
        f"| {interval(list(gap.ci95))} | {percent(gap.acc_at_50 / whole) if whole else '-'} |"
        for name, (unpruned, gap) in rows.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
