"""What torch makes of a module is made once in a run of the tests."""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import onnx
import onnx_ir as ir
from torch.onnx._internal.exporter import _decomp, _registration

from gap_export.exporting import trace
from gap_export.families import Component
from tests.shared import SharedFolder

# Packages whose code stays what it is during a run.
_STABLE = {"builtins", "collections", "gap_export", "numpy", "tests", "torch", "transformers"}


_Trace = Callable[[Component, int], ir.Model]


@functools.cache
def share_traces(shared: SharedFolder) -> _Trace:
    """Let all exports of this process look up traces; returns what really makes them."""
    # For every export torch reads the signatures of 500 ONNX functions anew, from their source:
    # more than half the time of a small one. What it makes of them is the same each time, too.
    apis, registry = _registration.onnxscript_apis, _registration.ONNXRegistry
    apis.get_torchlib_ops = functools.cache(apis.get_torchlib_ops)
    registry.from_torchlib = staticmethod(functools.cache(registry.from_torchlib))
    table = functools.cache(_decomp.create_onnx_friendly_decomposition_table)
    _decomp.create_onnx_friendly_decomposition_table = lambda ops: dict(table(frozenset(ops)))

    really_trace: _Trace = trace._trace
    trace._trace = SharedTraces(shared, really_trace).trace
    return really_trace


class SharedTraces:
    """What torch makes of a module, looked up by all that the module is made of.

    A trace reads no weight, so that models of one shape share it, wherever their weights lie and
    whatever is done with the graph.
    """

    def __init__(self, shared: SharedFolder, really_trace: _Trace) -> None:
        self._shared = shared
        self._really_trace = really_trace

    def trace(self, component: Component, opset: int) -> ir.Model:
        """Stands for ``exporting.trace._trace``."""
        sizes = sorted(component.example_sizes.items())
        parts = io.BytesIO()
        try:
            _Parts(parts).dump((component.module, component.inputs, sizes, opset))
        except (AttributeError, TypeError, pickle.PicklingError):
            return self._really_trace(component, opset)
        path = self._shared.once(
            f"trace-{hashlib.sha256(parts.getvalue()).hexdigest()[:16]}",
            lambda path: _save_trace(self._really_trace(component, opset), path),
        )
        return _load_trace(path)


class _Parts(pickle.Pickler):
    """Refuses what is known by name alone and may be other code in the next test."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, type | FunctionType) and obj.__module__.split(".")[0] not in _STABLE:
            raise pickle.PicklingError(obj)
        return NotImplemented


def _save_trace(model: ir.Model, path: Path) -> None:
    for value in model.graph.initializers.values():
        if getattr(getattr(value.const_value, "raw", None), "is_meta", False):
            value.const_value = ir.ExternalTensor(
                "meta", 0, 0, value.dtype, shape=value.shape, name=value.name
            )
    path.write_bytes(ir.serde.serialize_model(model).SerializeToString())


def _load_trace(path: Path) -> ir.Model:
    model = ir.from_proto(onnx.ModelProto.FromString(path.read_bytes()))
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = None
    return model
