"""Runs a bundle's base graphs in OpenVINO: on a CPU, or on Intel's GPU or NPU.

The decoder keeps its KV cache itself, as states of an infer request: a cache is a request of its
own, so that any number of them live side by side.

Left to itself OpenVINO computes in bfloat16 and int8 where a CPU has them, and keeps its cache in
8 bits. Here it computes in float32, unless asked otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from gap_export.bundle import Bundle
from gap_export.bundle.tensors import read_place
from gap_export.errors import BundleError, GapExportError, UsageError
from gap_export.runtime.backends.backend import (
    BAKED,
    DECODER,
    NEWLINE,
    Backend,
    Feed,
    FloatArray,
    KVCache,
    Outputs,
    graph_components,
    lacks_component,
)
from gap_export.runtime.backends.openvino_loading import (
    BEAM_IDX,
    OPENVINO_ERRORS,
    PAST,
    first_line,
    import_openvino,
    make_stateful,
    read_graph,
    refused,
    version,
)
from gap_export.spec.manifest import GraphSpec
from gap_export.spec.requests import DEFAULT_OPENVINO, OpenVinoOptions

if TYPE_CHECKING:
    import openvino as ov

_DTYPES = ("float32", "float16")
_GROUP_SIZE = "DYNAMIC_QUANTIZATION_GROUP_SIZE"
# Of a layer of int8 weights, whose scales are by channel: a larger group is hardly faster.
_INT8_GROUP_SIZE = "128"
_HINTS: Mapping[str, str] = MappingProxyType({"float32": "f32", "bfloat16": "bf16"})


@dataclass
class OpenVinoCache:
    """Keys and values, which the infer request holds.

    Attributes:
        batch_size: B.
        request: The decoder with its states.
        length: Slots filled.
    """

    batch_size: int
    request: ov.InferRequest
    length: int = 0


class OpenVinoBackend(Backend):
    """The bundle's base graphs in OpenVINO.

    Args:
        bundle: An opened, that is checked, bundle.
        options: The device, and how it computes.
        num_threads: Threads on a CPU; by default OpenVINO decides.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        UsageError: there is no such device.
        BundleError: a graph that OpenVINO refuses, or a dtype other than float32 and float16.
    """

    continues_prompts = True

    def __init__(
        self,
        bundle: Bundle,
        options: OpenVinoOptions = DEFAULT_OPENVINO,
        *,
        num_threads: int | None = None,
    ) -> None:
        self._openvino = import_openvino()
        self._manifest = manifest = bundle.manifest
        self._core = self._openvino.Core()
        self.dtype = _check_dtype(manifest.dtype)
        self.quantization = manifest.graph(DECODER).quantization
        self.activations = manifest.graph(DECODER).activations
        self.inference_precision = options.inference_precision
        self._device = self._check_device(options.device)
        self._int8_layers: dict[str, str] = {}
        self.name = f"OpenVINO {version(self._openvino)} ({_describe(options)})"
        self._newline: FloatArray | None = None
        if manifest.newline is not None:
            self._newline = read_place(bundle.path, manifest.newline).astype(self.dtype)
        self._config = self._settings(num_threads)
        self._graphs = {name: self._load(bundle, name) for name in graph_components(manifest)}
        self._states = {
            value.name: np.dtype(value.dtype)
            for value in manifest.graph(DECODER).inputs
            if value.name.startswith(PAST)
        }
        self._reads_beams = BEAM_IDX in self._graphs[DECODER].inputs
        self._idle: dict[str, list[ov.InferRequest]] = {name: [] for name in self._graphs}
        self._lock = Lock()

    def close(self) -> None:
        """Free the graphs."""
        self._idle.clear()
        self._graphs.clear()

    def run(self, component: str, feed: Feed) -> Outputs:
        """See Backend."""
        if component == NEWLINE and self._newline is not None:
            return {"image_newline": self._newline}
        graph = self._graphs.get(component)
        if graph is None:
            raise lacks_component(component, self._manifest)
        with self._lock:
            idle = self._idle[component]
            request = idle.pop() if idle else graph.compiled.create_infer_request()
        outputs = self._infer(graph, request, feed)
        with self._lock:
            idle.append(request)
        return outputs

    def new_cache(self, batch_size: int, num_slots: int) -> OpenVinoCache:
        """See Backend; OpenVINO has memory as it needs it."""
        del num_slots
        spec = self._manifest.decoder
        shape = (batch_size, spec.num_key_value_heads, 0, spec.head_dim)
        request = self._graphs[DECODER].compiled.create_infer_request()
        if not self._reads_beams:
            empty = {name: np.zeros(shape, dtype) for name, dtype in self._states.items()}
            self._fill(request, empty)
        return OpenVinoCache(batch_size=batch_size, request=request)

    def fork_cache(self, cache: KVCache, batch_size: int, num_slots: int) -> OpenVinoCache:
        """See Backend."""
        assert isinstance(cache, OpenVinoCache), "a cache belongs to the backend that made it"
        assert cache.batch_size == 1, "what is forked is one row"
        del num_slots
        request = self._graphs[DECODER].compiled.create_infer_request()
        held = {state.name: state.state.data for state in cache.request.query_state()}
        self._fill(request, {n: np.repeat(value, batch_size, axis=0) for n, value in held.items()})
        return OpenVinoCache(batch_size=batch_size, request=request, length=cache.length)

    def decode(self, feed: Feed, cache: KVCache) -> FloatArray:
        """See Backend."""
        assert isinstance(cache, OpenVinoCache), "a cache belongs to the backend that made it"
        if self._reads_beams:
            feed = {**feed, BEAM_IDX: np.arange(cache.batch_size)}
        logits = self._infer(self._graphs[DECODER], cache.request, feed)["logits"]
        cache.length += feed["inputs_embeds"].shape[1]
        last: FloatArray = logits[:, -1]
        return last

    def _fill(self, request: ov.InferRequest, values: Feed) -> None:
        """Set the states of a decoder."""
        for state in request.query_state():
            state.state = self._openvino.Tensor(np.ascontiguousarray(values[state.name]))

    def _infer(self, graph: _Graph, request: ov.InferRequest, feed: Feed) -> Outputs:
        """Outputs by name, copied out of the request."""
        try:
            given = {
                name: np.ascontiguousarray(array, dtype=graph.inputs[name])
                for name, array in feed.items()
                if name in graph.inputs or name != BAKED
            }
            found = request.infer(given, share_inputs=True, share_outputs=False)
        except OPENVINO_ERRORS as err:
            raise GapExportError(
                "OpenVINO failed while computing",
                seen=f"{graph.component}: {first_line(err)}",
                fix="check the bundle with: gap-export check BUNDLE --backend openvino",
            ) from err
        return {name: found[index] for name, index in graph.outputs.items()}

    def _load(self, bundle: Bundle, component: str) -> _Graph:
        spec = bundle.manifest.graph(component)
        is_int8 = spec.linear_layers == "int8"
        path = bundle.file(spec.file)
        model = read_graph(self._openvino, path, has_int8_layers=is_int8)
        _check_interface(model, spec)
        try:
            if component == DECODER:
                names = [value.name for value in spec.inputs if value.name.startswith(PAST)]
                make_stateful(self._openvino, model, names)
            config = {**self._config, **(self._int8_layers if is_int8 else {})}
            compiled = self._core.compile_model(model, self._device, config)
        except OPENVINO_ERRORS as err:
            raise refused(self._openvino, spec.file, err) from err
        return _Graph.of(component, compiled, spec)

    def _check_device(self, device: str) -> str:
        available = self._core.available_devices
        if device not in available and f"{device}.0" not in available:
            raise UsageError(
                "OpenVINO finds no such device here",
                seen=device,
                allowed=", ".join(available),
            )
        return device

    def _settings(self, num_threads: int | None) -> Mapping[str, str]:
        precision = _HINTS[self.inference_precision]
        wanted = {
            "INFERENCE_PRECISION_HINT": precision,
            "KV_CACHE_PRECISION": precision,
            # In blocks that share a scale, and in layers of quantized weights alone; 0 is never.
            _GROUP_SIZE: "32" if self.activations == "int8" else "0",
            "PERFORMANCE_HINT": "LATENCY",
        }
        if num_threads is not None:
            wanted["INFERENCE_NUM_THREADS"] = str(num_threads)
        known = self._core.get_property(self._device, "SUPPORTED_PROPERTIES")
        can = self._core.get_property(self._device, "OPTIMIZATION_CAPABILITIES")
        if self.inference_precision == "bfloat16" and "BF16" not in can:
            raise UsageError(
                "this device has no arithmetic of bfloat16",
                seen=self._device,
                allowed="--inference-precision float32",
            )
        if _GROUP_SIZE in known:
            self._int8_layers = {_GROUP_SIZE: _INT8_GROUP_SIZE}
        return MappingProxyType({name: value for name, value in wanted.items() if name in known})


@dataclass(frozen=True)
class _Graph:
    """A graph that can be run: by name its inputs' dtypes, and where its outputs are."""

    component: str
    compiled: ov.CompiledModel
    inputs: Mapping[str, np.dtype[Any]] = field(default_factory=dict)
    outputs: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, component: str, compiled: ov.CompiledModel, spec: GraphSpec) -> _Graph:
        # A tensor may have more names than the graph's own for it.
        inputs = {
            name: np.dtype(value.get_element_type().to_dtype())
            for value in compiled.inputs
            for name in value.get_names()
        }
        places = {
            name: index
            for index, value in enumerate(compiled.outputs)
            for name in value.get_names()
        }
        outputs = {v.name: places[v.name] for v in spec.outputs if v.name in places}
        return cls(component, compiled, inputs, outputs)


def _describe(options: OpenVinoOptions) -> str:
    """The device, and what is not as it is by default."""
    told = [options.device]
    if options.inference_precision != "float32":
        told.append(options.inference_precision)
    return ", ".join(told)


def _check_dtype(name: str) -> str:
    """The dtype of a bundle's floats, of those that numpy knows.

    Raises:
        BundleError: another one.
    """
    if name not in _DTYPES:
        raise BundleError(
            "this runtime cannot run the bundle's dtype",
            seen=name,
            allowed=", ".join(_DTYPES),
            fix="export with another dtype",
        )
    return name


def _check_interface(model: ov.Model, spec: GraphSpec) -> None:
    for kind, declared, found in (
        ("inputs", spec.inputs, model.inputs),
        ("outputs", spec.outputs, model.outputs),
    ):
        names = {name for value in found for name in value.get_names()}
        if not {value.name for value in declared} <= names or len(declared) != len(found):
            raise BundleError(
                f"{kind} of {spec.file} are not the manifest's",
                seen=", ".join(sorted(names)),
                allowed=", ".join(sorted(value.name for value in declared)),
                fix="export the bundle again",
            )
