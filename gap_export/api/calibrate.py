"""From which score on is an object there? ``calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from gap_export.api.check import BACKENDS, choose, openvino_flags, refuse_ignored
from gap_export.api.evaluate import SESSION_NAMES
from gap_export.bundle import open_bundle
from gap_export.bundle.calibration import Calibration, write_calibration
from gap_export.evaluation.calibrate import DEFAULT_SEED, CalibrationData, calibrate_bundle
from gap_export.evaluation.measure import RunnerOptions
from gap_export.progress import Progress, SilentProgress
from gap_export.spec.manifest import FormName
from gap_export.spec.requests import (
    DEFAULT_OPENVINO,
    BackendOptions,
    GrammarName,
    OpenVinoOptions,
)


def calibrate(
    bundle: str | Path,
    *,
    data: str = "refshapes",
    samples: int | None = None,
    absent: float | None = None,
    recall: float = 0.95,
    seed: int = DEFAULT_SEED,
    grammar: str | None = None,
    backend: str = "ort",
    engines: str | None = None,
    form: FormName | None = None,
    openvino: OpenVinoOptions = DEFAULT_OPENVINO,
    progress: Progress | None = None,
) -> Calibration:
    """Find the score from which on an answer of a bundle is found, and keep it with the bundle.

    ``calibration.json`` is written into the bundle's folder; one that is there is replaced. From
    then on ``Grounding.found`` says whether an answer's score reaches the threshold.

    Args:
        bundle: Its folder.
        data: As of ``evaluate``; some of its expressions have no object in their image.
        samples: Expressions whose object is there; None for 500 of what is drawn, else all.
        absent: Of what is drawn: share of expressions whose object is not there; None for half.
        recall: Share of the objects that are there to be found. The threshold is the highest that
            reaches it.
        seed: Of the scenes that are drawn, and of the intervals; another one than an
            evaluation's by default.
        grammar: As of ``GroundingSession``, which gives verdicts with the same one alone.
        backend: What runs the bundle, as of ``evaluate``.
        engines: As of ``evaluate``.
        form: As of ``evaluate``.
        openvino: As of ``evaluate``.
        progress: Progress reporter.

    Returns:
        What was written.

    Raises:
        BundleError: damaged.
        UsageError: the data set cannot be used, or the recall is reached at no threshold.
        OutputError: the bundle's folder cannot be written.
    """
    (runner,) = choose([backend], BACKENDS, "--backend")
    if runner != "trt":
        refuse_ignored("it is for --backend trt", {"--engines": engines})
    if runner != "ort":
        refuse_ignored("it is for --backend ort", {"--form": form})
    if runner != "openvino":
        refuse_ignored("it is for --backend openvino", openvino_flags(openvino))
    chosen: GrammarName | None = None
    if grammar is not None:
        (chosen,) = choose([grammar], get_args(GrammarName), "--grammar")
    opened = open_bundle(bundle)
    found = calibrate_bundle(
        opened,
        CalibrationData(data=data, samples=samples, absent=absent, recall=recall, seed=seed),
        RunnerOptions(
            backend=SESSION_NAMES[runner],
            backend_options=BackendOptions(engines=engines, form=form, openvino=openvino),
            seed=seed,
            grammar=chosen,
        ),
        progress or SilentProgress(),
    )
    write_calibration(opened, found)
    return found
