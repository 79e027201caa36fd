#!/usr/bin/env python3
"""Break bundles of tiny models in the ways that their families alone know, as tools/check_mutants.

    tools/check_family_mutants.py           some minutes on two cores
    tools/check_family_mutants.py --write   put the table into docs/results

Position ids of three axes, DeepStack, tiles. Weights are random, which hides nothing: whether ids
and tensors are right does not depend on what a model has learned.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import typer
from pages import ROOT, called_as, note, publish

sys.path.insert(0, str(ROOT))

from check_mutants import marks

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.exporting import Dtype, ExportOptions, export_model
from gap_export.parity.check import check_bundle
from gap_export.parity.question import Question
from gap_export.parity.results import CheckReport, Level
from gap_export.parity.truth import TorchTruth
from gap_export.spec.recipe import load_recipe
from gap_export.spec.requests import PruningRequest
from tests.families.qwen_vl.tiny import CANVASES, make_tiny
from tests.families.tiny_internvl import write_internvl
from tests.parity.mrope_mutants import AXES_MUTANTS, TAPS_MUTANTS
from tests.parity.mutants import Mutant
from tests.parity.tile_mutants import TILE_MUTANTS

LEVELS: tuple[Level, ...] = ("positions", "tensor", "token")
QUESTIONS = 4
# Qwen2.5-VL's own: its frequencies of columns are so low that no float16 logit tells.
_THETA = 1e6


@dataclass(frozen=True, kw_only=True)
class Model:
    """A tiny model, and the faults that it can have."""

    name: str
    mutants: Mapping[str, tuple[Mutant, Level]]
    keep_ratio: float
    dtype: Dtype = "float32"

    def write(self, folder: Path) -> Path:
        """Its checkpoint, with a recipe beside."""
        if self.name == "InternVL3.5":
            write_internvl(folder, decoder="qwen3", form="original")
            return folder
        family = "qwen3_vl" if self.name == "Qwen3-VL" else "qwen2_5_vl"
        made = make_tiny(family, folder, canvas=CANVASES["rows > cols"]).folder
        if family == "qwen2_5_vl":
            config = json.loads((made / "config.json").read_text())
            config["rope_theta"] = _THETA
            (made / "config.json").write_text(json.dumps(config))
        return made


MODELS = (
    Model(name="Qwen3-VL", mutants=AXES_MUTANTS | TAPS_MUTANTS, keep_ratio=0.1),
    Model(name="Qwen2.5-VL", mutants=AXES_MUTANTS, keep_ratio=0.1, dtype="float16"),
    Model(name="InternVL3.5", mutants=TILE_MUTANTS, keep_ratio=0.3),
)


def main(write: bool = False) -> None:
    """Check everything, and print one line a fault."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for model in MODELS:
            rows += check_model(model, Path(scratch) / model.name)
    heads = ["model", "fault", *LEVELS]
    lines = [f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows)]
    command = f"`{called_as('check_family_mutants.py')}`"
    publish("family-mutants", "\n".join([command, "", *lines]), write=write)


def check_model(model: Model, folder: Path) -> list[list[str]]:
    """A row for each fault, then one for none."""
    checkpoint = model.write(folder / "checkpoint")
    honest = folder / "bundle"
    request = PruningRequest(pruner="spatial", keep_ratio=model.keep_ratio)
    export_model(
        ExportOptions(model=str(checkpoint), pruning=request, dtype=model.dtype, out=honest)
    )
    title, rows = f"{model.name}, {model.dtype}", []
    for name, (mutate, level) in model.mutants.items():
        report = check(mutate(honest, folder / name.replace(" ", "-")), checkpoint)
        failed = [one.level for one in report.backends[0].levels if one.status == "failed"]
        first = failed[0] if failed else "no level"
        if first != level:
            raise SystemExit(f"{title}: {name}: first noticed by {first}, not by {level}")
        rows.append([title, name, *marks(report)])
        note(f"{title}: {name}: {first}")
    report = check(honest, checkpoint)
    if not report.passed:
        raise SystemExit(f"the honest bundle of {title} fails")
    return [*rows, [title, "none", *marks(report)]]


def check(bundle: Path, checkpoint: Path) -> CheckReport:
    """In ONNX Runtime against PyTorch, on images of noise."""
    random = np.random.default_rng(0)
    questions = [
        Question(
            image=random.integers(0, 255, (40, 60, 3)).astype(np.uint8), expression="the " + word
        )
        for word in ("star", "lady", "circle", "dog")[:QUESTIONS]
    ]
    recipe = load_recipe(checkpoint / "recipe.yaml")
    truth = TorchTruth(recipe, Checkpoint.of(checkpoint), questions)
    return check_bundle(open_bundle(bundle, verify="full"), reference=truth, levels=LEVELS)


if __name__ == "__main__":
    typer.run(main)
