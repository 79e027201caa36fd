"""gap-export: grounding vision-language models, pruned and exported with their position ids.

The public API is small: :class:`GroundingSession` runs a bundle and answers with a
:class:`Grounding`, whose ``box`` is a :data:`Box`; :func:`export_model` makes a bundle. All errors
that are raised on purpose are a :class:`GapExportError`. Everything loads on first use, so that
``import gap_export`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gap_export.version import __version__

if TYPE_CHECKING:
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
    from gap_export.exporting import ExportOptions, export_model
    from gap_export.runtime.grounding import Grounding
    from gap_export.runtime.images.geometry import Box
    from gap_export.runtime.session import GroundingSession

__all__ = [
    "Box",
    "BundleError",
    "CheckpointError",
    "ComputationError",
    "EngineError",
    "ExportError",
    "ExportOptions",
    "ExpressionError",
    "GapExportError",
    "Grounding",
    "GroundingSession",
    "ImageError",
    "MissingDependencyError",
    "OutputError",
    "ParityError",
    "PassError",
    "RecipeError",
    "UnknownModelError",
    "UnsupportedPrunerError",
    "UsageError",
    "__version__",
    "export_model",
]

# Of what is not an error.
_HOMES = {
    "Box": "gap_export.runtime.images.geometry",
    "ExportOptions": "gap_export.exporting",
    "Grounding": "gap_export.runtime.grounding",
    "GroundingSession": "gap_export.runtime.session",
    "export_model": "gap_export.exporting",
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
