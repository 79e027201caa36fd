"""gap-export: grounding vision-language models, pruned and exported with their position ids.

- :func:`export` makes a bundle of a model, :func:`patch` of an ONNX export that another tool made;
  :func:`build` adds TensorRT engines.
- :func:`check` compares a bundle with PyTorch, or with a golden that :func:`record` wrote;
  :func:`evaluate` measures how well it grounds, and :func:`bench` how fast it is;
  :func:`plan` says beforehand what fits a device and how fast; :func:`calibrate` finds the score
  from which on an object is there.
- :class:`GroundingSession` runs a bundle and answers with a :class:`Grounding`, whose ``box`` is a
  :data:`Box`.

What is asked of them is said in frozen requests: :class:`PruningRequest`, :class:`WeightsRequest`,
:class:`EnginesRequest`, :class:`LimitsRequest` and :class:`BuildOptions`. Every error that is
raised on purpose is a :class:`GapExportError`. Each name loads on first use, so that
``import gap_export`` costs nothing, and on a device nothing but the runtime is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gap_export.version import __version__

if TYPE_CHECKING:
    from gap_export.api.bench import bench
    from gap_export.api.calibrate import calibrate
    from gap_export.api.check import check, record
    from gap_export.api.evaluate import evaluate
    from gap_export.api.make import build, export, patch
    from gap_export.api.plan import plan
    from gap_export.benchmark.results import BenchReport
    from gap_export.errors import (
        BundleError,
        CheckpointError,
        ComputationError,
        EngineError,
        ExportError,
        ExpressionError,
        GapExportError,
        ImageError,
        MissingDependencyError,
        OutputError,
        ParityError,
        PassError,
        RecipeError,
        UnknownModelError,
        UnsupportedPrunerError,
        UsageError,
    )
    from gap_export.evaluation.results import EvaluationReport
    from gap_export.exporting.options import ExportReport
    from gap_export.parity.results import CheckReport
    from gap_export.patching.options import PatchReport
    from gap_export.planning.results import PlanReport
    from gap_export.runtime.grounding import Grounding
    from gap_export.runtime.images.geometry import Box
    from gap_export.runtime.session import GroundingSession
    from gap_export.spec.requests import (
        BuildOptions,
        EnginesRequest,
        LimitsRequest,
        OpenVinoOptions,
        PruningRequest,
        WeightsRequest,
    )

__all__ = [
    "BenchReport",
    "Box",
    "BuildOptions",
    "BundleError",
    "CheckReport",
    "CheckpointError",
    "ComputationError",
    "EngineError",
    "EnginesRequest",
    "EvaluationReport",
    "ExportError",
    "ExportReport",
    "ExpressionError",
    "GapExportError",
    "Grounding",
    "GroundingSession",
    "ImageError",
    "LimitsRequest",
    "MissingDependencyError",
    "OpenVinoOptions",
    "OutputError",
    "ParityError",
    "PassError",
    "PatchReport",
    "PlanReport",
    "PruningRequest",
    "RecipeError",
    "UnknownModelError",
    "UnsupportedPrunerError",
    "UsageError",
    "WeightsRequest",
    "__version__",
    "bench",
    "build",
    "calibrate",
    "check",
    "evaluate",
    "export",
    "patch",
    "plan",
    "record",
]

# Where a name that is not an error is defined.
_HOMES = {
    "BenchReport": "gap_export.benchmark.results",
    "Box": "gap_export.runtime.images.geometry",
    "BuildOptions": "gap_export.spec.requests",
    "CheckReport": "gap_export.parity.results",
    "EnginesRequest": "gap_export.spec.requests",
    "EvaluationReport": "gap_export.evaluation.results",
    "ExportReport": "gap_export.exporting.options",
    "Grounding": "gap_export.runtime.grounding",
    "GroundingSession": "gap_export.runtime.session",
    "LimitsRequest": "gap_export.spec.requests",
    "OpenVinoOptions": "gap_export.spec.requests",
    "PatchReport": "gap_export.patching.options",
    "PlanReport": "gap_export.planning.results",
    "PruningRequest": "gap_export.spec.requests",
    "WeightsRequest": "gap_export.spec.requests",
    "bench": "gap_export.api.bench",
    "build": "gap_export.api.make",
    "calibrate": "gap_export.api.calibrate",
    "check": "gap_export.api.check",
    "evaluate": "gap_export.api.evaluate",
    "export": "gap_export.api.make",
    "patch": "gap_export.api.make",
    "plan": "gap_export.api.plan",
    "record": "gap_export.api.check",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "gap_export.errors")), name)


def __dir__() -> list[str]:
    """Names that have not been used yet included."""
    return sorted({*globals(), *__all__})
