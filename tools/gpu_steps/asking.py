"""The same expressions asked of two sessions: are the answers equal, and how long do they take?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from gap_export import Grounding, GroundingSession
from gap_export.benchmark.samples import spread_of
from gap_export.evaluation.refshapes import iter_samples
from gap_export.parity.metrics import intersection_over_union
from gpu_steps.record import Figures, NotRunError

CPU = "CPUExecutionProvider"
# Answers before the first that counts: kernels are compiled and memory is taken in them.
WARM_UP = 3
STAGES = ("total", "vision_encoder", "prefill", "decode")
# A hit, as in the evaluation.
_HIT = 0.5


def ask(bundle: Path, samples: int, **arguments: Any) -> list[Grounding]:
    """Answers of a bundle.

    Args:
        bundle: Its folder.
        samples: How many held-out expressions of RefShapes are asked, one by one.
        arguments: Of :meth:`GroundingSession.open`.
    """
    asked = list(iter_samples(seed=0, num_samples=samples))
    with GroundingSession.open(bundle, **arguments) as session:
        for sample in asked[:WARM_UP]:
            session.ground(sample.image, sample.expression.text)
        return [session.ground(sample.image, sample.expression.text) for sample in asked]


@cache
def on_the_cpu(bundle: Path, samples: int) -> list[Grounding]:
    """Answers of a bundle's portable graphs on the CPU, asked once in a process."""
    return ask(bundle, samples, execution_providers=[CPU], form="base")


def compare(
    bundle: Path, reference: Path, samples: int, *, runs_in: str = "", **arguments: Any
) -> Figures:
    """What a bundle answers, beside a float32 bundle on the CPU.

    Args:
        bundle: What is looked at.
        reference: The float32 bundle of the same pruning.
        samples: Expressions.
        runs_in: What the backend's name must hold, e.g. an execution provider.
        arguments: Of :meth:`GroundingSession.open`, for ``bundle``.

    Raises:
        NotRunError: something else ran it.
    """
    given = ask(bundle, samples, **arguments)
    if runs_in not in given[0].backend:
        raise NotRunError(f"it ran in {given[0].backend}, and not in {runs_in}")
    expected = on_the_cpu(reference, samples)
    truth = [sample.box for sample in iter_samples(seed=0, num_samples=samples)]
    pairs = list(zip(given, expected, strict=True))
    return {
        "runs": given[0].backend,
        "n": samples,
        "same_tokens": sum(
            a.token_ids == b.token_ids for a, b in zip(given, expected, strict=True)
        ),
        "lowest_iou": min(_overlap(one.box, other.box) for one, other in pairs),
        "hits": sum(_overlap(a.box, box) > _HIT for a, box in zip(given, truth, strict=True)),
        "hits_of_the_reference": sum(
            _overlap(a.box, box) > _HIT for a, box in zip(expected, truth, strict=True)
        ),
        "ms": _spreads(given),
        "ms_of_the_reference": _spreads(expected),
    }


def _overlap(one: Any, other: Any) -> float:
    """Intersection over union; of two answers without a box 1."""
    if one is None or other is None:
        return float(one is other)
    return intersection_over_union(one, other)


def _spreads(answers: Sequence[Grounding]) -> Figures:
    return {
        stage: asdict(spread_of([answer.timings_ms.get(stage, 0.0) for answer in answers]))
        for stage in STAGES
    }
