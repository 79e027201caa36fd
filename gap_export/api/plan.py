"""What fits a device, and how fast? ``plan``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gap_export.errors import UsageError
from gap_export.extras import require_extra
from gap_export.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from gap_export.planning.results import PlanReport

ANSWER_TOKENS = 32


def plan(
    model: str,
    *,
    device: str = "this-cpu",
    device_file: str | Path | None = None,
    measured: Sequence[str | Path] = (),
    latency_ms: float | None = None,
    memory_gb: float | None = None,
    keep: Sequence[float] = (),
    pruners: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    canvases: Sequence[str] = (),
    answer_tokens: int = ANSWER_TOKENS,
    text_tokens: int | None = None,
    recipe: str | None = None,
    progress: Progress | None = None,
) -> PlanReport:
    """Say what of a model fits a device, how fast it will be, and which export to make.

    Nothing is exported, and a recipe that says its sizes needs no checkpoint.

    Args:
        model: As :func:`gap_export.export` takes it.
        device: Name in the table of devices; ``this-cpu``: this machine, whose rates are measured.
        device_file: Devices of the user's own.
        measured: Reports of :func:`gap_export.bench` from that device, in their JSON form.
        latency_ms: Budget of an answer.
        memory_gb: Budget, in 1e9 bytes; None: what the device has.
        keep: Shares of visual tokens to look at; by default six from 1 to 0.1.
        pruners: By default the recipe's; ``all``: every one that the model can serve.
        dtypes: By default 16-bit floats on a GPU, float32 on a CPU, and INT4.
        canvases: ``WxH``; by default the recipe's, and smaller ones where the model takes any.
        answer_tokens: Tokens of an answer.
        text_tokens: Tokens of a prompt beside the visual ones; by default by the recipe's words.
        recipe: Recipe that a checkpoint folder follows.
        progress: Progress reporter.

    Raises:
        UnknownModelError: no such model.
        UsageError: no such device or choice, a budget that is none, budgets that contradict each
            other, or a model whose sizes are in a checkpoint that is not here.

    Example:
        >>> import gap_export
        >>> found = gap_export.plan("refshapes-llava", device="orin-nano-8gb", keep=[0.3])
        >>> found.best.fits
        True
    """
    _check_numbers(
        latency_ms=latency_ms,
        memory_gb=memory_gb,
        answer_tokens=answer_tokens,
        text_tokens=text_tokens,
    )
    require_extra("export", "planning an export")
    from gap_export.planning.devices import THIS_CPU, cpu_of, find_device, list_devices

    own = None if device_file is None else Path(device_file)
    known = list_devices(own)
    # A name that is none is said before the imports that take seconds.
    there = None if device == THIS_CPU and device not in known else find_device(device, own)
    with (progress or SilentProgress()).stage("loading PyTorch"):
        from gap_export.families import supported_pruners
        from gap_export.planning.calibrate import calibrated, read_benchmark
        from gap_export.planning.model import PlannedModel
        from gap_export.planning.plan import KEEPS, Budget, make_plan

    reports = [read_benchmark(Path(one)) for one in measured]
    if there is not None:
        found = there
    elif reports:
        # At the rates that it had while it was measured.
        facts = [one["machine"] for one in reports]
        found = cpu_of(
            max(one["gemm_gflops"] for one in facts), max(one["bandwidth_gb_s"] for one in facts)
        )
    else:
        found = find_device(device, own)
    planned = PlannedModel(
        model, recipe=recipe, answer_tokens=answer_tokens, text_tokens=text_tokens
    )
    chosen = list(pruners) or [planned.recipe.defaults.pruner]
    if chosen == ["all"]:
        chosen = list(supported_pruners(planned.recipe))
    wanted = list(dtypes) or list(found.dtypes)
    unknown = next((one for one in wanted if one not in _DTYPES), None)
    if unknown is not None:
        raise UsageError("no such dtype", seen=unknown, allowed=", ".join(_DTYPES))
    if reports:
        found = calibrated(found, reports)
    return make_plan(
        planned,
        found,
        Budget(latency_ms=latency_ms, memory_bytes=None if memory_gb is None else 1e9 * memory_gb),
        keeps=list(keep) or KEEPS,
        pruners=chosen,
        dtypes=wanted,
        canvases=list(canvases) or planned.canvases(),
        called=model,
        progress=progress,
    )


_DTYPES = ("float32", "float16", "bfloat16", "int4")


def _check_numbers(**numbers: float | None) -> None:
    """Refuse budgets and lengths that are none.

    Raises:
        UsageError: one is not above 0.
    """
    for name, value in numbers.items():
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UsageError(
                f"{name.replace('_', ' ')} is no such budget or length",
                seen=value,
                allowed="a number above 0",
            )
