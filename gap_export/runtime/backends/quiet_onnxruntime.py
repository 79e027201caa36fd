"""ONNX Runtime, imported so that it reports nothing to its maker.

Its Python module starts the reporting while it is imported: it stores a device id below the user's
home, and a session that stays open asks DNS for a telemetry host. ``disable_telemetry_events()``
comes too late for both; only this variable, set before the import, stops them. All code of the
package imports ONNX Runtime from here (ruff's banned-api sees to that), and child processes inherit
the variable. A value that the user has set is left alone.
"""

from __future__ import annotations

import os

TELEMETRY_SWITCH = "ORT_DISABLE_TELEMETRY"
if not os.environ.get(TELEMETRY_SWITCH):
    os.environ[TELEMETRY_SWITCH] = "1"

import onnxruntime as ort  # noqa: E402, TID251
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors  # noqa: E402, TID251

__all__ = ["ort", "ort_errors"]
