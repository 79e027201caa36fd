"""Count the multiply-adds of the vision graphs that each pruner exports to.

    tools/count_multiply_adds.py                              the demo model
    tools/count_multiply_adds.py --model llava --keep 0.3     a model of true size; needs no weights
    tools/count_multiply_adds.py --write-readme

Traces the vision side alone, runs the passes, and adds up what MatMul, Gemm and Conv multiply for
one picture, from the shapes in the graph.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import onnx_ir as ir
import typer
from readme_figures import write_section

from gap_export.families import build_reference, resolve_pruning, supported_pruners
from gap_export.passes import PIPELINES, run_pipeline
from gap_export.source import resolve_model
from gap_export.trace import trace_component
from gap_export.weights import SAFETENSORS_NAMES, TORCH_DTYPES, PlacedTensor

README = Path(__file__).resolve().parent.parent / "README.md"
VISION = ("vision_encoder", "token_pruner")


def main(model: str = "refshapes-llava", keep: float = 0.3, write_readme: bool = False) -> None:
    """Print a table: one line a pruner."""
    recipe, checkpoint = resolve_model(
        model, recipe=None, parts={}, random_seed=None if model == "refshapes-llava" else 0
    )
    lines = [
        f"`tools/count_multiply_adds.py --model {model} --keep {keep:g}`",
        "",
        f"| pruner | {recipe.name}: multiply-adds of the vision graphs | over `spatial` |",
        "|---|---|---|",
    ]
    counts = {}
    for name in supported_pruners(recipe):
        pruning = resolve_pruning(
            recipe, pruner=name, keep_ratio=keep, order=None, positions="gap", seed=0
        )
        reference = build_reference(recipe, checkpoint, pruning, device="meta")
        counts[name] = 0
        for component in reference.components:
            if component.name in VISION:
                dtype = SAFETENSORS_NAMES[reference.dtype]
                size = TORCH_DTYPES[dtype].itemsize
                placed = {
                    key: PlacedTensor(
                        location="weights",
                        offset=0,
                        length=size * math.prod(weight.shape),
                        dtype=dtype,
                        shape=tuple(weight.shape),
                    )
                    for key, weight in component.weight_refs.items()
                }
                traced = trace_component(component, placed=placed)
                run_pipeline(traced, PIPELINES[component.name])
                counts[name] += count(traced.graph)
    for name, number in counts.items():
        more = number / counts["spatial"] - 1
        lines.append(f"| `{name}` | {number / 1e6:,.1f} M | {100 * more:+.2f} % |")
    table = "\n".join(lines)
    typer.echo(table)
    if write_readme:
        write_section(README, "multiply-adds", table)


def count(graph: ir.Graph) -> int:
    """Multiply-adds of all products in a graph, and in the loops within it."""
    total = 0
    for node in graph:
        if node.op_type == "Scan":
            turns = _shape(node.inputs[-1])[0]
            total += turns * count(node.attributes["body"].as_graph())
        elif node.op_type == "MatMul":
            total += math.prod(_shape(node.outputs[0])) * _shape(node.inputs[0])[-1]
        elif node.op_type == "Gemm":
            flipped = "transA" in node.attributes and node.attributes["transA"].as_int()
            inner = _shape(node.inputs[0])[0 if flipped else 1]
            total += math.prod(_shape(node.outputs[0])) * inner
        elif node.op_type == "Conv":
            total += math.prod(_shape(node.outputs[0])) * math.prod(_shape(node.inputs[1])[1:])
    return total


def _shape(value: ir.Value | None) -> list[int]:
    assert value is not None and value.shape is not None, f"no shape of {value}"
    return [_size(dim) for dim in value.shape]


def _size(dim: int | ir.SymbolicDim) -> int:
    """A dimension for one picture and one expression, which is what its names then stand for."""
    if isinstance(dim, int):
        return dim
    factors = re.sub(r"[A-Za-z_]\w*", "1", str(dim.value)).strip("()").split("*")
    assert all(factor.strip().isdigit() for factor in factors), f"a size that is not known: {dim}"
    return math.prod(int(factor) for factor in factors)


if __name__ == "__main__":
    typer.run(main)
