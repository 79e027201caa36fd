"""A benchmark on a device says what of its roofline each stage reaches there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gap_export.benchmark.results import PER_TOKEN
from gap_export.benchmark.results import SCHEMA as BENCH_SCHEMA
from gap_export.errors import GapExportError, UsageError
from gap_export.planning.devices import Device, Fit
from gap_export.planning.estimate import roofline_s
from gap_export.planning.model import PlannedModel, weights_of
from gap_export.planning.results import DECODE, PREFILL, TOWER
from gap_export.spec.requests import PruningRequest

# What a benchmark calls the stages.
STAGES: Mapping[str, str] = {TOWER: "vision_encoder", PREFILL: "prefill", DECODE: PER_TOKEN}
_MAX_BYTES = 16 << 20
_MAX_SHOWN = 200
_MIN_SHARE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Point:
    """One stage of one bundle that was measured.

    Attributes:
        stage: ``tower``, ``prefill`` or ``decode``.
        dtype: Of the stage's weights.
        row: Name of the row, with its model.
        ideal_ms: By the roofline, at the device's peaks.
        measured_ms: The median.
    """

    stage: str
    dtype: str
    row: str
    ideal_ms: float
    measured_ms: float

    def predict(self, fit: Fit) -> float:
        """Milliseconds by a fit."""
        return self.ideal_ms / fit.share + fit.step_us / 1e3


def read_benchmark(path: Path) -> dict[str, Any]:
    """The JSON form of a report of ``bench``.

    Raises:
        UsageError: the file is no such report.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(_MAX_BYTES + 1)
        plain = json.loads(raw.decode())
        known = len(raw) <= _MAX_BYTES and plain["schema"] == BENCH_SCHEMA
        # Of another file no row is read, which fails as a broken one does.
        rows: list[Any] = plain["rows"] if known else [None]
        for row in rows:
            for name in (STAGES[TOWER], STAGES[PREFILL]):
                float(row["stages"][name]["median"])
            (row["dtype"] + row["name"] + row["bundle"]).strip()
            float(row["keep_ratio"]), float(row["prompt_tokens"]), float(row["answer_tokens"])
        for name in ("gemm_gflops", "bandwidth_gb_s"):
            float(plain["machine"][name])
        str(plain["model"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise UsageError(
            "--measured takes what gap-export bench --json printed",
            seen=f"{path}: {type(err).__name__}: {err}"[:_MAX_SHOWN],
            fix="gap-export bench BUNDLE --json > FILE, on the device",
        ) from err
    assert isinstance(plain, dict)
    return plain


def points_of(report: Mapping[str, Any], device: Device) -> list[Point]:
    """What a report measured, and what the roofline says of it.

    A report does not name pruners, whose share of a tower's time is small: the recipe's stands for
    them.

    Args:
        report: From :func:`read_benchmark`.
        device: Whose peaks count.

    Raises:
        UsageError: the model that was measured is not known here.
    """
    found: list[Point] = []
    for row in report["rows"]:
        floats = row["dtype"].partition(" ")[0]
        stages = {
            stage: row["stages"][name]["median"]
            for stage, name in STAGES.items()
            if name in row["stages"]
        }
        try:
            found += points_of_bundle(
                report["model"],
                device,
                row=f"{report['model']} {row['name']}",
                request=PruningRequest(keep_ratio=row["keep_ratio"]),
                dtype="int4" if "int4" in row["dtype"] else floats,
                floats=floats,
                prompt_tokens=round(row["prompt_tokens"]),
                answer_tokens=round(row["answer_tokens"]),
                measured_ms=stages,
            )
        except GapExportError as err:
            raise UsageError(
                "the model of a benchmark is not known here, so its work cannot be counted",
                seen=str(report["model"])[:_MAX_SHOWN],
                fix="measure a model that has a recipe: gap-export models",
            ) from err
    return found


def points_of_bundle(
    model: str,
    device: Device,
    *,
    row: str,
    request: PruningRequest,
    dtype: str,
    floats: str,
    prompt_tokens: int,
    answer_tokens: int,
    measured_ms: Mapping[str, float],
) -> list[Point]:
    """The stages of one bundle.

    Args:
        model: MODEL to take the sizes of.
        device: Whose peaks count.
        row: What to call it.
        request: How it is pruned.
        dtype: As ``--dtype`` has it.
        floats: Dtype of what is no 4-bit integer.
        prompt_tokens: Tokens of a prompt.
        answer_tokens: Tokens of an answer.
        measured_ms: Milliseconds by stage.

    Raises:
        GapExportError: no such model, or it cannot be pruned so.
    """
    planned = PlannedModel(model, answer_tokens=max(2, answer_tokens), prompt_tokens=prompt_tokens)
    work = planned.work(request)
    weights = weights_of(work, dtype, floats)
    return [
        Point(
            stage=stage,
            dtype=weights.kind(stage),
            row=row,
            ideal_ms=1e3 * roofline_s(work.costs[stage], weights, device),
            measured_ms=milliseconds,
        )
        for stage, milliseconds in measured_ms.items()
    ]


def fit_points(points: Sequence[Point]) -> dict[str, Fit]:
    """A share of the roofline and a fixed time, by stage and dtype.

    Both by least squares of relative errors where points differ enough to tell them apart, else
    the share alone.
    """
    fits = {}
    for key in dict.fromkeys((one.stage, one.dtype) for one in points):
        mine = [one for one in points if (one.stage, one.dtype) == key]
        ideal = np.array([one.ideal_ms for one in mine])
        measured = np.array([one.measured_ms for one in mine])
        slope, step = float(np.median(measured / ideal)), 0.0
        if len(mine) > 1 and ideal.max() > 1.5 * ideal.min():
            columns = np.stack([ideal / measured, 1 / measured], axis=1)
            (fitted, fixed), *_ = np.linalg.lstsq(columns, np.ones(len(mine)), rcond=None)
            if fitted > _MIN_SHARE and fixed >= 0:
                slope, step = float(fitted), float(fixed)
        fits[" ".join(key)] = Fit(share=1 / slope, step_us=1e3 * step, num_rows=len(mine))
    return fits


def calibrated(device: Device, reports: Sequence[Mapping[str, Any]]) -> Device:
    """The device as benchmarks on it have shown it."""
    points = [point for report in reports for point in points_of(report, device)]
    return device.model_copy(update={"fits": fit_points(points)})
