#!/usr/bin/env python3
"""Count the multiply-adds of the vision graphs that each pruner exports to.

    tools/count_multiply_adds.py                     the demo model, and a 7B one: needs no weights
    tools/count_multiply_adds.py --model minigpt-v2 --keep 0.5
    tools/count_multiply_adds.py --write             puts the table into docs/results

Traces the vision side alone, runs the passes, and adds up what its products multiply for one image,
from the shapes in the graph.
"""

from __future__ import annotations

import math
from typing import Annotated

import onnx_ir as ir
import typer
from pages import DEMO_MODEL, publish

from gap_export.checkpoint.find.source import resolve_model
from gap_export.checkpoint.weights import SAFETENSORS_NAMES, TORCH_DTYPES, PlacedTensor
from gap_export.exporting.trace import trace_component
from gap_export.families import build_reference, resolve_pruning, supported_pruners
from gap_export.families.common.reference import Component
from gap_export.graph.multiply_adds import count_multiply_adds
from gap_export.graph.pipelines import PIPELINES, run_pipeline
from gap_export.spec.requests import PruningRequest

VISION = ("vision_encoder", "token_pruner")


def main(
    model: Annotated[list[str], typer.Option()] = [DEMO_MODEL, "llava-1.5-7b"],  # noqa: B006 - typer's
    keep: float = 0.3,
    write: bool = False,
) -> None:
    """Print a table: one line a pruner."""
    counts = {name: count_model(name, keep) for name in model}
    models = " ".join(f"--model {name}" for name in model)
    heads = " | ".join(f"{name}: multiply-adds | over `spatial`" for name in model)
    lines = [
        f"`tools/count_multiply_adds.py {models} --keep {keep:g}`",
        "",
        f"| pruner | {heads} |",
        "|---" * (1 + 2 * len(model)) + "|",
    ]
    for pruner in dict.fromkeys(name for found in counts.values() for name in found):
        cells = []
        for found in counts.values():
            number = found.get(pruner)
            cells += ["", ""] if number is None else _cells(number, found["spatial"])
        lines.append(f"| `{pruner}` | {' | '.join(cells)} |")
    publish("multiply-adds", "\n".join(lines), write=write)


def count_model(model: str, keep: float) -> dict[str, int]:
    """Multiply-adds of the vision graphs by pruner."""
    recipe, checkpoint = resolve_model(
        model, recipe=None, parts={}, random_seed=None if model == DEMO_MODEL else 0
    )
    counts = {}
    for name in supported_pruners(recipe):
        pruning = resolve_pruning(
            recipe,
            PruningRequest(pruner=name, keep_ratio=keep, order=None),
        )
        reference = build_reference(recipe, checkpoint, pruning, device="meta")
        vision = [component for component in reference.components if component.name in VISION]
        counts[name] = sum(
            count_multiply_adds(trace(component, reference.dtype)) for component in vision
        )
        typer.echo(f"{model} {name}: {counts[name]}", err=True)
    return counts


def trace(component: Component, dtype: str) -> ir.Graph:
    """A component's graph as the bundle has it; its weights are names."""
    stored = SAFETENSORS_NAMES[dtype]
    size = TORCH_DTYPES[stored].itemsize
    placed = {
        key: PlacedTensor(
            location="weights",
            offset=0,
            length=size * math.prod(weight.shape),
            dtype=stored,
            shape=tuple(weight.shape),
        )
        for key, weight in component.weight_refs.items()
    }
    traced = trace_component(component, placed=placed)
    run_pipeline(traced, PIPELINES[component.name])
    return traced.graph


def _cells(number: int, spatial: int) -> list[str]:
    return [f"{number / 1e6:,.1f} M", f"{100 * (number / spatial - 1):+.2f} %"]


if __name__ == "__main__":
    typer.run(main)
