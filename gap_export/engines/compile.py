"""One graph to one engine file, by TensorRT's builder."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from gap_export.bundle import Bundle
from gap_export.engines.graph_hash import hash_weights, listed_file
from gap_export.engines.inspect import check_interface, read_interface
from gap_export.engines.library import TensorRT
from gap_export.engines.log import log_of
from gap_export.engines.memory import peak_bytes, reset_peak
from gap_export.engines.monitor import STEPS, PhaseTally, make_monitor
from gap_export.engines.network import build_failed, other_ways, out_of_memory, parse_graph
from gap_export.engines.plan import EngineSpec, ProfileSpec, WeightsHeld
from gap_export.engines.profiles import make_profiles
from gap_export.engines.targets import TargetChoice
from gap_export.engines.timing_cache import keep_timing_cache, use_timing_cache
from gap_export.errors import EngineError
from gap_export.progress import Advance, Progress
from gap_export.spec.manifest import EngineLimits, GraphSpec
from gap_export.spec.requests import BuildOptions

_CHUNK_BYTES = 16 << 20
# Members of BuilderFlag.
_FLAGS: Mapping[WeightsHeld, tuple[str, ...]] = MappingProxyType(
    {"included": (), "streamed": ("WEIGHT_STREAMING",), "stripped": ("STRIP_PLAN",)}
)
# How often the waiting thread looks up, so that a signal is heard while TensorRT works.
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class BuildPlace:
    """What all engines of a folder have in common.

    Attributes:
        bundle: The bundle.
        choice: The target.
        library: Its TensorRT.
        limits: What the profiles are made from.
        compute_capability: SM number of the GPU the engines are for.
    """

    bundle: Bundle
    choice: TargetChoice
    library: TensorRT
    limits: EngineLimits
    compute_capability: int


def compile_graph(
    place: BuildPlace, graph: GraphSpec, folder: Path, *, options: BuildOptions, progress: Progress
) -> EngineSpec:
    """Build one engine into ``<component>.engine`` of a folder.

    TensorRT works in a thread of its own, so that Ctrl+C is heard at once: the builder is asked to
    stop, which it does at its next step, and what interrupted goes on from here.

    Raises:
        EngineError: TensorRT does not take the graph, or cannot build it.
        BundleError: the graph's dimensions or weights are not what they should be.
        OSError: the engine cannot be written.
    """
    stop = threading.Event()
    with (
        progress.stage(f"building {graph.component}", total=STEPS) as advance,
        ThreadPoolExecutor(max_workers=1) as worker,
    ):
        work = worker.submit(_compile, place, graph, folder, options, advance, stop)
        try:
            while not wait([work], timeout=_POLL_S).done:
                continue
        except BaseException:
            stop.set()
            raise
        try:
            return work.result()
        except MemoryError as err:
            raise out_of_memory(graph, str(err) or "Python could not allocate") from err


def _compile(
    place: BuildPlace,
    graph: GraphSpec,
    folder: Path,
    options: BuildOptions,
    advance: Advance,
    stop: threading.Event,
) -> EngineSpec:
    library, bundle, module = place.library, place.bundle, place.library.module
    path = bundle.file(graph.file)
    advice = other_ways(bundle, graph, place.choice, library)
    profiles = make_profiles(bundle.manifest, graph, place.limits)
    reset_peak()
    started = time.perf_counter()
    log = log_of(module)
    parsed = parse_graph(library, graph, path, advice)
    builder = parsed.builder
    interface = read_interface(parsed.network)
    check_interface(interface, graph)
    config = _configure(place, builder, options, profiles)
    # Referred to from here as well: TensorRT does not keep it alive.
    monitor = make_monitor(module, PhaseTally(advance), stop)
    config.progress_monitor = monitor
    name = f"{graph.component}.engine"
    with log.recording() as errors, (folder / name).open("xb") as file:
        plan = PlanFile(file)
        built = _build(module, builder, parsed.network, config, plan)
    if stop.is_set():
        raise EngineError("the build was stopped", seen=graph.component)
    if plan.failure is not None:
        raise plan.failure
    if not built:
        raise build_failed(library, graph, path, errors, advice)
    keep_timing_cache(library, config, place.compute_capability)
    return EngineSpec(
        component=graph.component,
        file=name,
        size=plan.size,
        sha256=plan.sha256,
        graph=graph.file,
        graph_sha256=listed_file(bundle, graph.file).sha256,
        weights_sha256=hash_weights(bundle, graph.file),
        lowering=graph.lowering,
        dtype=graph.dtype,
        quantization=graph.quantization,
        kv_contract=graph.kv_contract,
        weights=options.weights,
        profiles=profiles,
        inputs=interface.inputs,
        outputs=interface.outputs,
        build_seconds=round(time.perf_counter() - started, 3),
        peak_memory_bytes=peak_bytes(),
    )


def _configure(
    place: BuildPlace, builder: Any, options: BuildOptions, profiles: tuple[ProfileSpec, ...]
) -> Any:
    module = place.library.module
    config = builder.create_builder_config()
    if place.library.is_rtx:
        config.num_compute_capabilities = 1
        generation = getattr(module.ComputeCapability, f"SM{place.compute_capability}")
        config.set_compute_capability(generation, 0)
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    for flag in _FLAGS[options.weights]:
        config.set_flag(getattr(module.BuilderFlag, flag))
    for profile in profiles:
        made = builder.create_optimization_profile()
        for name, shapes in profile.shapes.items():
            sizes = profile.values.get(name)
            put = made.set_shape if sizes is None else made.set_shape_input
            chosen = sizes or shapes
            put(name, chosen.min, chosen.opt, chosen.max)
        config.add_optimization_profile(made)
    use_timing_cache(place.library, config, place.compute_capability)
    return config


def _build(module: Any, builder: Any, network: Any, config: Any, plan: PlanFile) -> bool:
    """Build and write; piece by piece where TensorRT can, which takes the room of one plan less."""
    if not hasattr(builder, "build_serialized_network_to_stream"):
        memory = builder.build_serialized_network(network, config)
        if memory is not None:
            plan.write(memoryview(memory))
        return memory is not None

    class _Writer(module.IStreamWriter):  # type: ignore[misc]
        def __init__(self) -> None:
            # pybind11 wants the base's constructor called by its name.
            module.IStreamWriter.__init__(self)

        def write(self, data: bytes) -> int:
            return len(data) if plan.write(memoryview(data)) else 0

    return bool(builder.build_serialized_network_to_stream(network, config, _Writer()))


class PlanFile:
    """An engine's file while it is written.

    Attributes:
        size: Bytes so far.
        failure: Why it cannot be written on, if so; an exception must not pass through TensorRT.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.size = 0
        self.failure: OSError | None = None

    @property
    def sha256(self) -> str:
        """SHA-256 of what was written, in hex."""
        return self._digest.hexdigest()

    def write(self, content: memoryview) -> bool:
        """Append; False, with the reason kept, where that fails."""
        try:
            for start in range(0, len(content), _CHUNK_BYTES):
                piece = content[start : start + _CHUNK_BYTES]
                self._file.write(piece)
                self._digest.update(piece)
                self.size += len(piece)
            self._file.flush()
        except OSError as err:
            self.failure = err
        return self.failure is None
