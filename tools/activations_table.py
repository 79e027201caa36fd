#!/usr/bin/env python3
"""Acc@0.5 of INT4 with int8 activations and with an INT4 LM head, paired with INT4 without.

    tools/activations_table.py                      prints the table, some minutes on two cores
    tools/activations_table.py --samples 200        quicker and coarser
    tools/activations_table.py --write              puts it into docs/results

All forms answer the same held-out questions in ONNX Runtime on the CPU, pruned and with GAP; forms
of one model share their INT4 integers. Intervals are of the difference, question by question.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from pages import called_as, note, percent, publish

import gap_export
from gap_export import GroundingSession, PruningRequest, WeightsRequest
from gap_export.bundle import Bundle, open_bundle
from gap_export.evaluation.refshapes import iter_samples
from gap_export.evaluation.statistics import bootstrap_interval
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from gap_export.spec.manifest import Activations

KEEP_RATIO = 0.3
MODELS = ("refshapes-llava", "refshapes-shikra", "refshapes-qwen3-vl")
CPU = ("CPUExecutionProvider",)
# Each form, and the one that it is compared with.
BESIDE = {
    "INT4, float activations": "float32",
    "INT4, int8 activations": "INT4, float activations",
    "INT4 with the LM head, int8 activations": "INT4, int8 activations",
}


class Answers(NamedTuple):
    """What one form answered.

    Attributes:
        hits: bool [N], whether a box overlaps the truth by half.
        token_ids: Of each answer.
    """

    hits: np.ndarray
    token_ids: list[tuple[int, ...]]


def main(
    samples: int = 1000,
    model: Annotated[list[str] | None, typer.Option()] = None,
    write: bool = False,
) -> None:
    """Measure and print."""
    lines = [
        f"{samples} held-out expressions, greedy; each model's own pruner, keep {KEEP_RATIO:g}, "
        "GAP. Beside: the difference to the row above, in points, with its 95 % interval.",
        "",
        "| model | weights | Acc@0.5 | beside the row above | same tokens |",
        "|---|---|---|---|---|",
    ]
    for name in model or MODELS:
        lines += rows_of(name, samples=samples)
    table = "\n".join(lines)
    publish("activations", f"`{called_as('activations_table.py')}`\n\n{table}", write=write)


def rows_of(model: str, *, samples: int) -> list[str]:
    """The rows of one model."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch)
        floats = export(model, WeightsRequest(dtype="float32"), out / "float32")
        plain = export(model, WeightsRequest(dtype="int4"), out / "int4")
        head = export(model, WeightsRequest(dtype="int4", quantize_lm_head=True), out / "head")
        forms = {
            "float32": floats,
            "INT4, float activations": with_activations(plain, "float"),
            "INT4, int8 activations": with_activations(plain, "int8"),
            "INT4 with the LM head, int8 activations": with_activations(head, "int8"),
        }
        answers: dict[str, Answers] = {}
        images: list[str] = []
        for form, bundle in forms.items():
            note(f"asking {model}, {form}")
            answers[form], images = ask(bundle, samples=samples)
    lines = []
    for form, found in answers.items():
        beside, same = "", ""
        if form in BESIDE:
            other = answers[BESIDE[form]]
            change = found.hits.astype(np.float64) - other.hits
            low, high = bootstrap_interval(change, images, seed=0)
            beside = f"{100 * change.mean():+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
            pairs = zip(found.token_ids, other.token_ids, strict=True)
            same = percent(float(np.mean([mine == theirs for mine, theirs in pairs])))
        accuracy = percent(float(found.hits.mean()))
        lines.append(f"| {model} | {form} | **{accuracy}** | {beside} | {same} |")
    return lines


def export(model: str, weights: WeightsRequest, out: Path) -> Bundle:
    """A bundle of a model."""
    gap_export.export(model, PruningRequest(keep_ratio=KEEP_RATIO), weights=weights, out=out)
    return open_bundle(out)


def with_activations(bundle: Bundle, activations: Activations) -> Bundle:
    """The same bundle, its quantized graphs run otherwise."""
    graphs = [
        dataclasses.replace(graph, activations=activations) if graph.quantization else graph
        for graph in bundle.manifest.graphs
    ]
    manifest = dataclasses.replace(bundle.manifest, graphs=tuple(graphs))
    return dataclasses.replace(bundle, manifest=manifest)


def ask(bundle: Bundle, *, samples: int) -> tuple[Answers, list[str]]:
    """What a bundle answers, and the image of each question."""
    by_image: dict[int, list[tuple[str, tuple[int, int, int, int]]]] = {}
    pixels = {}
    for sample in iter_samples(seed=0, num_samples=samples):
        asked = by_image.setdefault(sample.scene.index, [])
        asked.append((sample.expression.text, sample.box))
        pixels[sample.scene.index] = sample.image
    hits, token_ids, images = [], [], []
    backend = OnnxRuntimeBackend(bundle, CPU)
    with GroundingSession(bundle.manifest, bundle.path, backend) as session:
        for index, asked in by_image.items():
            found = session.ground_batch(pixels[index], [text for text, _ in asked])
            for answer, (_, truth) in zip(found, asked, strict=True):
                hits.append(answer.box is not None and overlap(answer.box, truth) >= 0.5)
                token_ids.append(answer.token_ids)
                images.append(str(index))
    return Answers(np.asarray(hits), token_ids), images


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2)."""
    corners = np.asarray([one, other], dtype=np.float64)
    inside = np.clip(corners[:, 2:].min(0) - corners[:, :2].max(0), 0, None).prod()
    areas = (corners[:, 2:] - corners[:, :2]).prod(1)
    total = areas.sum() - inside
    return float(inside / total) if total > 0 else 0.0


if __name__ == "__main__":
    typer.run(main)
