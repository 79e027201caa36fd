"""The main job: recipe and checkpoint -> reference -> trace -> passes -> bundle."""

from __future__ import annotations

from gap_export.exporting.export import export_checkpoint, export_model
from gap_export.exporting.graph_cache import GraphCache
from gap_export.exporting.options import (
    DTYPES,
    ExportOptions,
    ExportReport,
    resolve_options,
)
from gap_export.spec.requests import Dtype

__all__ = [
    "DTYPES",
    "Dtype",
    "ExportOptions",
    "ExportReport",
    "GraphCache",
    "export_checkpoint",
    "export_model",
    "resolve_options",
]
