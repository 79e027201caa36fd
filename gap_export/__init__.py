"""gap-export: grounding vision-language models, pruned and exported with their position ids.

The public API is small: :class:`GroundingSession` runs a bundle, :func:`export_model` makes one.
Both load on first use, so that ``import gap_export`` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gap_export.version import __version__

__all__ = ["ExportOptions", "GroundingSession", "__version__", "export_model"]

if TYPE_CHECKING:
    from gap_export.pipeline import ExportOptions, export_model
    from gap_export.runtime.session import GroundingSession

_HOMES = {
    "ExportOptions": "gap_export.pipeline",
    "GroundingSession": "gap_export.runtime.session",
    "export_model": "gap_export.pipeline",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its home on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
