"""How well does a model ground? ``evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from gap_export.api.check import BACKENDS, choose, openvino_flags, refuse_ignored
from gap_export.api.make import Parts, parts_of
from gap_export.bundle.drafts import find_standing
from gap_export.evaluation import evaluate as evaluation
from gap_export.evaluation.evaluate import Asking
from gap_export.evaluation.results import EvaluationReport
from gap_export.evaluation.settings import MISALIGNMENTS
from gap_export.exporting import ExportOptions
from gap_export.outputs import NO_RULE, OutputRule
from gap_export.progress import Progress
from gap_export.runtime.session import BackendName
from gap_export.spec.manifest import MANIFEST_NAME, FormName
from gap_export.spec.requests import (
    AS_STORED,
    DEFAULT_OPENVINO,
    BackendOptions,
    GrammarName,
    OpenVinoOptions,
    PruningRequest,
    WeightsRequest,
    options_of,
)

SESSION_NAMES: Mapping[str, BackendName] = {
    "ort": "onnxruntime",
    "trt": "tensorrt",
    "openvino": "openvino",
}


def evaluate(
    target: str | Path,
    prunings: Sequence[PruningRequest] = (),
    *,
    data: str = "refshapes",
    samples: int | None = None,
    absent: float = 0.0,
    seed: int = 0,
    protocol: str = "native",
    prompt: str | None = None,
    grammar: str | None = None,
    misaligned: Sequence[str] = (),
    weights: WeightsRequest = AS_STORED,
    recipe: str | None = None,
    checkpoint: Parts | None = None,
    baseline: str | Path | None = None,
    backend: str = "ort",
    engines: str | None = None,
    form: FormName | None = None,
    openvino: OpenVinoOptions = DEFAULT_OPENVINO,
    workers: str = "1",
    records: str | Path | None = None,
    pictures: str | Path | None = None,
    rule: OutputRule = NO_RULE,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Measure Acc@0.5 of a model unpruned, with compact positions, and with GAP.

    Args:
        target: A model, which is exported for every pruning; or a bundle, taken as it is.
        prunings: What is measured of a model; empty for what its recipe has.
        data: What to measure on: ``refshapes[:heldout|train]``, or ``refshapes-2``, which is
            harder; ``refcoco:ROOT:SPLIT``, refcoco+ or refcocog; or ``FOLDER[:SPLIT]``.
        samples: Expressions to ask, the first of each split; 0 for all; None for 500 of what
            is drawn, else all.
        absent: Of what is drawn: share of expressions in all that is asked whose object is not
            there; they come on top of ``samples`` and are part of no accuracy.
        seed: Seed of the samples and of random orders.
        protocol: When an answer is right: ``native`` is that of the model's authors.
        prompt: A template in place of the model's own prompt.
        grammar: ``box`` constrains every answer to hold a well-formed box; None: answers are free.
        misaligned: ``permuted``, ``shifted``: measure the unpruned model with wrong positions too.
        weights: Of a model: the dtype of its weights.
        recipe: Of a model: the recipe that a checkpoint folder follows.
        checkpoint: The checkpoint's folder, or its parts by role.
        baseline: Of a bundle: its model exported with all tokens; None to make it.
        backend: What runs a bundle: ``ort`` for ONNX Runtime, ``trt`` for its engines,
            ``openvino`` for OpenVINO.
        engines: With ``trt``: a folder below the bundle's ``engines/``.
        form: With ``ort``: ``base`` or ``ort`` of the graphs; None for the fastest that runs.
        openvino: With ``openvino``: how it runs.
        workers: Who answers: 1 for this process, a number, ``auto``, or ``ray://HOST:PORT``.
        records: A folder that keeps the answers; what it holds is not asked again.
        pictures: A folder for a drawing of each row's first answer.
        rule: Files that drawings must not replace.
        progress: Progress reporter.

    Returns:
        A row for the unpruned model, for each misalignment, and two for every pruning.

    Raises:
        UsageError: an option is not usable, or would be ignored.

    Example:
        >>> import gap_export
        >>> gap_export.evaluate("demo", samples=2).rows[-1].positions
        'gap'
    """
    bundles = bundles_of(target, baseline)
    rule = replace(rule, outside={**bundles, **rule.outside})
    for option, folder in (("--records", records), ("--pictures", pictures)):
        if folder is not None:
            rule.check_outside(option, Path(folder))
    asking = Asking(
        data=data,
        protocol=protocol,
        prompt=prompt,
        grammar=None
        if grammar is None
        else choose([grammar], get_args(GrammarName), "--grammar")[0],
        misaligned=tuple(choose(misaligned, MISALIGNMENTS, "--misaligned")),
        records=None if records is None else Path(records),
        workers=workers,
        pictures=None if pictures is None else Path(pictures),
        rule=rule,
        absent=absent,
    )
    (runner,) = choose([backend], BACKENDS, "--backend")
    parts = parts_of(checkpoint)
    if is_bundle(target):
        refuse_ignored("a bundle is pruned already", dict.fromkeys(_flags(prunings), True))
        own = {each.flag: getattr(weights, each.name) for each in options_of(WeightsRequest)}
        refuse_ignored("a bundle says that itself", {"--recipe": recipe, **own})
        if runner != "trt":
            refuse_ignored("it is for --backend trt", {"--engines": engines})
        if runner != "ort":
            refuse_ignored("it is for --backend ort", {"--form": form})
        if runner != "openvino":
            refuse_ignored("it is for --backend openvino", openvino_flags(openvino))
        if baseline is not None:
            refuse_ignored("with --baseline no checkpoint is read", {"--checkpoint": parts})
        return evaluation.evaluate_bundle(
            Path(target),
            baseline=None if baseline is None else Path(baseline),
            checkpoint=parts,
            seed=seed,
            num_samples=samples,
            asking=asking,
            backend=SESSION_NAMES[runner],
            options=BackendOptions(engines=engines, form=form, openvino=openvino),
            progress=progress,
        )
    of_bundles = {
        "--baseline": baseline, "--engines": engines, "--form": form, **openvino_flags(openvino),
    }  # fmt: skip
    refuse_ignored("it is for a BUNDLE", of_bundles)
    refuse_ignored(
        "a MODEL is measured in ONNX Runtime; export it and name the BUNDLE",
        {"--backend": runner != "ort"},
    )
    dtype, quantization, activations = weights.resolve()
    options = ExportOptions(
        model=str(target),
        pruning=PruningRequest(seed=seed),
        recipe=recipe,
        checkpoint=parts,
        dtype=dtype,
        quantization=quantization,
        activations=activations,
        vision_dtype=weights.vision_dtype,
    )
    return evaluation.evaluate_model(
        options, prunings=prunings, num_samples=samples, asking=asking, progress=progress
    )


def is_bundle(target: str | Path) -> bool:
    """Whether a target is the folder of a bundle."""
    try:
        return (find_standing(Path(target).absolute()) / MANIFEST_NAME).exists()
    except (OSError, ValueError):
        # No name of a file.
        return False


def bundles_of(target: str | Path, baseline: str | Path | None) -> dict[str, Path]:
    """The bundles that nothing may be written into, by what they are."""
    found = {"the bundle": Path(target)} if is_bundle(target) else {}
    return found if baseline is None else {**found, "the baseline": Path(baseline)}


def _flags(prunings: Sequence[PruningRequest]) -> list[str]:
    """The options, by flag, that any of the prunings gives a value; the seed is no part of it."""
    return [
        each.flag
        for each in options_of(PruningRequest)
        if each.name != "seed"
        and any(getattr(request, each.name) != each.default for request in prunings)
    ]
