"""Puts a pruner and GapRemap into ONNX exports of somebody else's, by graph passes alone."""

from __future__ import annotations

from gap_export.patching.options import PatchOptions, PatchReport
from gap_export.patching.patch import patch_export

__all__ = ["PatchOptions", "PatchReport", "patch_export"]
