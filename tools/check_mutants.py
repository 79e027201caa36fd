#!/usr/bin/env python3
"""Break bundles of the demo model in every known way, and see at which level `check` notices.

    tools/check_mutants.py                  some minutes on two cores
    tools/check_mutants.py --write          put the table into docs/results

The faults are those of tests/parity/mutants.py. The honest bundle is checked with five seeds.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import typer
from pages import DEMO_MODEL, ROOT, note, publish

sys.path.insert(0, str(ROOT))

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import Checkpoint, resolve_model
from gap_export.evaluation.refshapes import iter_samples
from gap_export.exporting import Dtype, ExportOptions, export_model
from gap_export.parity.check import check_bundle
from gap_export.parity.question import Question
from gap_export.parity.results import LEVELS, CheckReport
from gap_export.parity.truth import TorchTruth
from gap_export.spec.recipe import Recipe
from gap_export.spec.requests import PruningRequest
from tests.parity.mutants import MUTANTS, checkpoint_with_long_context, with_long_context

SEEDS = range(5)
# In float32 nothing overflows.
DTYPES: dict[str, Dtype] = {"fp16 overflow": "float16"}


def main(samples: int = 12, pruner: str = "spatial", write: bool = False) -> None:
    """Check everything, and print one line a fault."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        honest: dict[str, Path] = {}
        recipe, shipped = resolve_model(DEMO_MODEL, recipe=None, parts={})
        checkpoint = Checkpoint.of(
            checkpoint_with_long_context(shipped.parts["main"], Path(scratch) / "checkpoint")
        )
        for dtype in ("float32", "float16"):
            out = Path(scratch) / dtype
            export_model(
                ExportOptions(
                    model=DEMO_MODEL,
                    pruning=PruningRequest(pruner=pruner, keep_ratio=0.3),
                    dtype=dtype,
                    out=out,
                )
            )
            honest[dtype] = with_long_context(out, Path(scratch) / f"{dtype}-long")
        for name, (mutate, level) in MUTANTS.items():
            dtype = DTYPES.get(name, "float32")
            faulty = mutate(honest[dtype], Path(scratch) / name.replace(" ", "-"))
            report = check(faulty, recipe, checkpoint, seed=0, samples=samples)
            failed = [lv.level for lv in report.backends[0].levels if lv.status == "failed"]
            first = failed[0] if failed else "no level"
            if first != level:
                raise SystemExit(f"{name}: first noticed by {first}, not by {level}")
            rows.append([name, *marks(report), where(report)])
            note(f"{name}: {first}")
        for seed in SEEDS:
            report = check(honest["float32"], recipe, checkpoint, seed=seed, samples=samples)
            if not report.passed:
                raise SystemExit(f"the honest bundle fails with seed {seed}")
            rows.append([f"none (seed {seed})", *marks(report), ""])
    heads = ["fault", *LEVELS, "the first tensor that diverges"]
    table = "\n".join(
        [
            f"`tools/check_mutants.py --samples {samples} --pruner {pruner}`",
            "",
            f"| {' | '.join(heads)} |",
            "|---" * len(heads) + "|",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )
    publish("mutants", table, write=write)


def check(
    bundle: Path, recipe: Recipe, checkpoint: Checkpoint, *, seed: int, samples: int
) -> CheckReport:
    """All levels, in ONNX Runtime, against PyTorch."""
    opened = open_bundle(bundle, verify="full")
    questions = [
        Question(image=sample.image, expression=sample.expression.text, box=sample.box)
        for sample in iter_samples(seed=seed, num_samples=samples)
    ]
    return check_bundle(opened, reference=TorchTruth(recipe, checkpoint, questions, seed=seed))


def marks(report: CheckReport) -> list[str]:
    """What each level says."""
    words = {"passed": "ok", "failed": "**fails**", "not_run": "-"}
    return [words[level.status] for level in report.backends[0].levels]


def where(report: CheckReport) -> str:
    """Operator and module."""
    found = report.backends[0].divergences
    return "; ".join(f"{one.operator} ({one.module or one.component})" for one in found)


if __name__ == "__main__":
    typer.run(main)
