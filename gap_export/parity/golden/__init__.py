"""Goldens: what PyTorch gave, kept in files, so that a check needs no PyTorch.

A golden is a folder: ``golden.json`` says what was recorded, of which model and with what;
``golden.safetensors`` holds all arrays, images included; ``golden.json.sha256`` vouches for the
first, and that for the second. Reading needs the standard library and numpy.
"""

from __future__ import annotations

from gap_export.parity.golden.opening import Golden, is_golden, open_golden
from gap_export.parity.golden.recording import ReferenceFacts, check_golden_place, record_golden

__all__ = [
    "Golden",
    "ReferenceFacts",
    "check_golden_place",
    "is_golden",
    "open_golden",
    "record_golden",
]
