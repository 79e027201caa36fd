"""TensorRT's Python API as far as the backend uses it; ONNX Runtime does the work.

An engine file names the ONNX graph of the bundle it was "built" from. Where the manifest says that
the cache is in place and the graph itself joins, past is cut out of the buffer and what is new is
written behind it.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from gap_export.bundle import Bundle, open_bundle, write_bundle
from gap_export.engines.graph_hash import hash_weights, listed_file
from gap_export.engines.library import TensorRT
from gap_export.engines.plan import EnginePlan, EngineSpec, EngineTensor
from gap_export.engines.profiles import make_profiles
from gap_export.runtime.backends import tensorrt_backend
from gap_export.runtime.backends.tensorrt_loading import choose_engines
from gap_export.spec.manifest import EngineLimits, GraphSpec
from tests.runtime.backends.fake_gpu import FakeDevice

VERSION = "10.16.0"
MAGIC = b"fake engine "
TAKEN = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
NAMES = {"float32": "FLOAT", "float16": "HALF", "bfloat16": "BF16", "int64": "INT64"}
STORED = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int64": np.int64}


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass


class ExecutionContextAllocationStrategy(enum.Enum):
    STATIC = 0
    ON_PROFILE_CHANGE = 1


class CudaGraphStrategy(enum.Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


@dataclass(eq=False)
class FakeModule:
    """The module ``tensorrt``; ``fails`` names calls that report a failure their usual way."""

    device: FakeDevice
    fails: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    contexts: list[FakeContext] = field(default_factory=list)
    handle: Any = None
    __version__: str = VERSION
    ILogger: type = ILogger
    ExecutionContextAllocationStrategy: type = ExecutionContextAllocationStrategy

    def note(self, call: str) -> bool:
        """Whether a call succeeds."""
        self.calls.append(call)
        if call in self.fails:
            self.handle.log(Severity.ERROR, f"[fake] {call} is out of order")
        return call not in self.fails

    def Runtime(self, logger: Any) -> FakeModule:  # noqa: N802 - its name
        self.handle = logger
        return self

    def deserialize_cuda_engine(self, buffer: Any) -> FakeEngine | None:
        raw = bytes(buffer)
        if not self.note("deserialize") or not raw.startswith(MAGIC):
            return None
        return FakeEngine(self, **json.loads(raw.removeprefix(MAGIC)))

    def Refitter(self, engine: FakeEngine, logger: Any) -> FakeEngine:  # noqa: N802
        return engine

    def OnnxParserRefitter(self, engine: FakeEngine, logger: Any) -> FakeEngine:  # noqa: N802
        return engine


@dataclass(eq=False)
class FakeRtxModule(FakeModule):
    """The module ``tensorrt_rtx``, which captures CUDA graphs by itself."""

    CudaGraphStrategy: type = CudaGraphStrategy


@dataclass
class RuntimeConfig:
    cuda_graph_strategy: Any = None
    allocation: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.allocation = strategy


@dataclass
class FakeEngine:
    """An engine; it does nothing before it has its weights."""

    module: FakeModule
    graph: str
    tensors: dict[str, list[Any]]
    inputs: list[str]
    profiles: list[dict[str, list[list[int]]]]
    in_place: bool
    has_weights: bool
    on_host: list[str]
    weight_streaming_budget_v2: int | None = None

    @property
    def num_io_tensors(self) -> int:
        return len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=NAMES[self.tensors[name][0]])

    def get_tensor_shape(self, name: str) -> list[int]:
        return self.tensors[name][1]

    def is_shape_inference_io(self, name: str) -> bool:
        return name in self.on_host

    def get_weight_streaming_automatic_budget(self) -> int:
        self.module.note("get_weight_streaming_automatic_budget")
        return 12345

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, options: Any) -> FakeContext | None:
        if not self.module.note("create_execution_context"):
            return None
        context = FakeContext(self, options)
        self.module.contexts.append(context)
        return context

    def refit_from_file(self, path: str) -> bool:
        assert path == self.graph
        return self.module.note("refit_from_file")

    def refit_cuda_engine(self) -> bool:
        self.has_weights = True
        return True


@dataclass
class FakeContext:
    """Shapes and addresses are taken when work is given, memory is read when it is done."""

    engine: FakeEngine
    options: Any
    profile: int | None = None
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    addresses: dict[str, int] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        self.profile = index
        return self.engine.module.note("set_optimization_profile_async")

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        assert self.profile is not None
        low, high = self.engine.profiles[self.profile][name]
        self.shapes[name] = tuple(shape)
        return all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True))

    def set_tensor_address(self, name: str, address: int) -> bool:
        if name in self.engine.on_host:
            # Sizes are read at once; what lies there later is not looked at.
            kind = ctypes.c_int64 * math.prod(self.shapes[name])
            self.values[name] = np.array(kind.from_address(address))
        else:
            assert address in self.engine.module.device.memory
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        if not engine.module.note("execute_async_v3"):
            return False
        assert set(self.addresses) == set(engine.tensors)
        assert engine.has_weights
        shapes, addresses, values = dict(self.shapes), dict(self.addresses), dict(self.values)
        engine.module.device.enqueue(stream, lambda: _compute(engine, shapes, addresses, values))
        return True


def _compute(
    engine: FakeEngine,
    shapes: dict[str, Any],
    addresses: dict[str, int],
    values: dict[str, np.ndarray],
) -> None:
    device = engine.module.device
    session = session_of(engine.graph)
    feed = dict(values)
    for value in session.get_inputs():
        if value.name in values:
            continue
        dtype = engine.tensors[value.name][0]
        stored = device.read(addresses[value.name], shapes[value.name], STORED[dtype])
        feed[value.name] = widen(stored, dtype).astype(TAKEN[value.type])
    past = (
        feed["attention_mask"].shape[1] - feed["inputs_embeds"].shape[1] if engine.in_place else 0
    )
    for name in [name for name in feed if engine.in_place and name.startswith("past")]:
        # Slots that are masked are still multiplied by zero.
        assert np.isfinite(feed[name]).all()
        if joins(session):
            feed[name] = feed[name][:, :, :past]
    names = [name for name in engine.tensors if name not in engine.inputs]
    for name, value in zip(names, session.run(names, feed), strict=True):
        dtype = engine.tensors[name][0]
        found = narrow(value, dtype)
        if engine.in_place and name.startswith("present"):
            assert addresses[name] == addresses[past_of(name)]
            if joins(session):
                buffer = device.read(addresses[name], shapes[past_of(name)], STORED[dtype])
                buffer[:, :, past : found.shape[2]] = found[:, :, past:]
                found = buffer
        device.write(addresses[name], found)


def joins(session: ort.InferenceSession) -> bool:
    """Whether a graph's own cache grows, so that one in place is to be made from it."""
    (past, *_) = [v.shape[2] for v in session.get_inputs() if v.name.startswith("past")]
    return past == "past_sequence_length"


def past_of(name: str) -> str:
    return name.replace("present", "past_key_values")


def widen(array: Any, dtype: str) -> Any:
    """As the float32 graph takes it."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array if dtype == "int64" else array.astype(np.float32)


def narrow(array: Any, dtype: str) -> Any:
    """As the engine writes it; bfloat16 by truncation, which is near enough."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
        return (bits >> 16).astype(np.uint16)
    return array.astype(STORED[dtype])


@cache
def session_of(graph: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    # It warns of each cache that it has to copy.
    options.log_severity_level = 3
    # As TensorRT does it: INT4 weights, float activations.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def fake_library(module: FakeModule, name: Any = "tensorrt") -> TensorRT:
    return TensorRT(name=name, module=module, version=module.__version__)


def use_fakes(monkeypatch: pytest.MonkeyPatch) -> FakeDevice:
    """Have every session with TensorRT run on one fake GPU, which is returned."""
    device = FakeDevice()
    module = FakeModule(device)
    fakes = partial(
        choose_engines,
        open_device=lambda: device,
        import_library=lambda name: fake_library(module, name),
    )
    monkeypatch.setattr(tensorrt_backend, "choose_engines", fakes)
    return device


def write_engines(
    bundle: Bundle, limits: EngineLimits, *, folder: str = "desktop-sm89", **changes: Any
) -> Path:
    """Engines for every component of the bundle.

    Args:
        bundle: Where; of several decoders the last one is taken.
        limits: Of the profiles.
        folder: Below ``engines/``.
        changes: Fields of the plan, and ``dtype`` and ``weights`` of its engines.
    """
    path = bundle.path / "engines" / folder
    path.mkdir(parents=True)
    usable = (graph for graph in bundle.manifest.graphs if graph.lowering != "ort")
    graphs = {graph.component: graph for graph in usable}
    dtype, weights = changes.pop("dtype", None), changes.pop("weights", "included")
    specs = [
        _write_engine(bundle, path, graph, limits, dtype or graph.dtype, weights)
        for graph in graphs.values()
    ]
    plan = EnginePlan(
        library="tensorrt",
        library_version=VERSION,
        target="desktop",
        compute_capability=89,
        limits=limits,
        engines=tuple(specs),
    )
    (path / "engine.json").write_bytes(replace(plan, **changes).to_json())
    return path


def _write_engine(
    bundle: Bundle, path: Path, graph: GraphSpec, limits: EngineLimits, dtype: str, weights: Any
) -> EngineSpec:
    profiles = make_profiles(bundle.manifest, graph, limits)
    inputs, outputs = (
        tuple(
            EngineTensor(
                name=tensor.name,
                dtype=_engine_dtype(tensor, dtype),
                shape=tuple(-1 if isinstance(dim, str) else dim for dim in tensor.shape),
                is_shape_tensor=tensor.name == "num_kept_tokens",
            )
            for tensor in tensors
        )
        for tensors in (graph.inputs, graph.outputs)
    )
    plain = {
        "graph": str(bundle.file(graph.file)),
        "tensors": {t.name: [t.dtype, t.shape] for t in (*inputs, *outputs)},
        "inputs": [t.name for t in inputs],
        "profiles": [{n: [s.min, s.max] for n, s in p.shapes.items()} for p in profiles],
        "in_place": graph.kv_contract == "in_place",
        "has_weights": weights != "stripped",
        "on_host": [t.name for t in inputs if t.is_shape_tensor],
    }
    raw = MAGIC + json.dumps(plain).encode()
    (path / f"{graph.component}.engine").write_bytes(raw)
    return EngineSpec(
        component=graph.component,
        file=f"{graph.component}.engine",
        size=len(raw),
        sha256=hashlib.sha256(raw).hexdigest(),
        graph=graph.file,
        graph_sha256=listed_file(bundle, graph.file).sha256,
        weights_sha256=hash_weights(bundle, graph.file),
        lowering=graph.lowering,
        dtype=dtype,
        quantization=graph.quantization,
        kv_contract=graph.kv_contract,
        weights=weights,
        profiles=profiles,
        inputs=inputs,
        outputs=outputs,
        build_seconds=0.0,
        peak_memory_bytes=0,
    )


def _engine_dtype(tensor: Any, dtype: str) -> str:
    # Pixels and scores are float32 in any case.
    kept = tensor.dtype == "int64" or tensor.name in ("pixel_values", "token_scores")
    return tensor.dtype if kept else dtype


def copy_bundle(source: Path, out: Path, *, in_place: bool = False) -> Bundle:
    """A bundle to put engines in; maybe with an in-place decoder as well.

    That decoder's file is the joining one's: only what the manifest says of its cache is another.
    """
    opened = open_bundle(source)
    manifest = opened.manifest
    name = "decoder_model_merged_fused_fp32.onnx"
    with write_bundle(out) as draft:
        for file in manifest.files:
            draft.place(opened.file(file.path), file.path, hold="copy")
        if in_place:
            draft.place(opened.file(manifest.graph("decoder_model_merged").file), name, hold="copy")
            graphs = (*manifest.graphs, _in_place(manifest.graph("decoder_model_merged"), name))
            manifest = replace(manifest, graphs=graphs)
        draft.commit(manifest)
    return open_bundle(out)


def _in_place(graph: GraphSpec, file: str) -> GraphSpec:
    names = {"past_sequence_length": "cache_capacity", "total_sequence_length": "cache_capacity"}

    def convert(tensor: Any) -> Any:
        if not tensor.name.startswith(("past", "present")):
            return tensor
        return replace(tensor, shape=tuple(names.get(dim, dim) for dim in tensor.shape))

    return replace(
        graph,
        lowering="fused",
        kv_contract="in_place",
        file=file,
        inputs=tuple(map(convert, graph.inputs)),
        outputs=tuple(map(convert, graph.outputs)),
    )
