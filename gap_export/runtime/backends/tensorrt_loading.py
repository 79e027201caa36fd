"""From a bundle's ``engines/`` to engines that can run: which folder fits, and loading them."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from gap_export.bundle import Bundle, Verify
from gap_export.engines.folder import (
    EngineFolder,
    check_runs_here,
    engine_folders,
    read_engine_folder,
    read_plan,
)
from gap_export.engines.library import LibraryName, TensorRT, import_tensorrt
from gap_export.engines.log import log_of, quote
from gap_export.engines.plan import EngineSpec
from gap_export.errors import (
    BundleError,
    EngineError,
    GapExportError,
    MissingDependencyError,
    UsageError,
)
from gap_export.runtime.backends.device import CudaDevice, DeviceMemory
from gap_export.runtime.backends.tensorrt_engine import (
    CapturedExecution,
    DirectExecution,
    Execution,
)

TITLES: Mapping[str, str] = MappingProxyType(
    {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
)
_BUILD = "build them: gap-export build BUNDLE --target TARGET"
ImportLibrary = Callable[[LibraryName], TensorRT]
_IMPORT: ImportLibrary = partial(import_tensorrt, purpose="running these engines")


@dataclass(frozen=True, kw_only=True)
class ChosenEngines:
    """Engines that run here, and what runs them."""

    folder: EngineFolder
    library: TensorRT
    device: CudaDevice


def choose_engines(
    bundle: Bundle,
    *,
    engines: str | None = None,
    verify: Verify = "stamp",
    open_device: Callable[[], CudaDevice] = CudaDevice,
    import_library: ImportLibrary = _IMPORT,
) -> ChosenEngines:
    """Find the folder of engines that fits the GPU and the TensorRT at hand.

    Args:
        bundle: An opened bundle.
        engines: A folder below ``engines/``; by default the first one that fits.
        verify: Whether every byte of the engines is hashed.
        open_device: Gives the GPU.
        import_library: Gives a TensorRT package by its name.

    Raises:
        BundleError: there are no engines, or the chosen ones are damaged, cut short or built from
            another graph.
        MissingDependencyError: cuda-python or the TensorRT package is not installed.
        UsageError: no GPU, or the engines are for another GPU or another TensorRT version.
    """
    names = engine_folders(bundle) if engines is None else (engines,)
    device = _check_means(names, open_device)
    plans = {name: read_plan(bundle, name) for name in names}
    refusals: dict[str, GapExportError] = {}
    for name, plan in plans.items():
        try:
            library = import_library(plan.library)
            check_runs_here(
                EngineFolder(path=bundle.path / "engines" / name, plan=plan),
                library=library.name,
                library_version=library.version,
                compute_capability=device.compute_capability,
            )
        except (MissingDependencyError, UsageError) as err:
            refusals[name] = err
            continue
        # Only those that will be used are hashed: an engine may have many gigabytes.
        folder = read_engine_folder(bundle, name, verify=verify)
        return ChosenEngines(folder=folder, library=library, device=device)
    if len(refusals) == 1:
        raise next(iter(refusals.values()))
    raise UsageError(
        "none of the bundle's engines runs here",
        seen="; ".join(f"{name}: {err.what}: {err.seen}" for name, err in refusals.items()),
        allowed=f"engines for {device.name}, SM {device.compute_capability}",
        fix=_BUILD,
    )


def _check_means(names: tuple[str, ...], open_device: Callable[[], CudaDevice]) -> CudaDevice:
    """All that is missing in one message, since none of it helps alone."""
    lacks: list[GapExportError] = []
    if not names:
        lacks.append(BundleError("the bundle holds no engines", fix=_BUILD))
    try:
        device = open_device()
    except (MissingDependencyError, UsageError) as err:
        lacks.append(err)
    if len(lacks) == 1:
        raise lacks[0]
    if lacks:
        raise UsageError(
            "TensorRT cannot run this bundle here",
            seen=" and ".join(
                lack.what if lack.seen is None else f"{lack.what} ({lack.seen})" for lack in lacks
            ),
            fix="; ".join(lack.fix for lack in lacks if lack.fix is not None),
        )
    return device


class EngineLoader:
    """Loads engines with one TensorRT, and makes their execution contexts."""

    def __init__(self, bundle: Bundle, chosen: ChosenEngines, memory: DeviceMemory) -> None:
        self._bundle = bundle
        self._folder = chosen.folder
        self._trt = chosen.library.module
        self._memory = memory
        self._log = log_of(self._trt)
        self._runtime = self._trt.Runtime(self._log.handle)

    def load(self, spec: EngineSpec) -> Any:
        """A component's engine.

        Raises:
            EngineError: TensorRT cannot read it, or it cannot be given its weights.
        """
        with self._log.recording() as errors:
            # Mapped, since an engine may be as large as the memory that is left.
            with (
                (self._folder.path / spec.file).open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            ):
                engine = self._runtime.deserialize_cuda_engine(mapped)
            if engine is None:
                raise _failed(f"cannot load {spec.file}", errors)
            if spec.weights == "stripped":
                refitter = self._trt.Refitter(engine, self._log.handle)
                parser = self._trt.OnnxParserRefitter(refitter, self._log.handle)
                graph = str(self._bundle.file(spec.graph))
                if not parser.refit_from_file(graph) or not refitter.refit_cuda_engine():
                    raise _failed(f"cannot give {spec.file} the weights of {spec.graph}", errors)
            if spec.weights == "streamed":
                # As much as fits; it counts only for contexts that are made after this.
                engine.weight_streaming_budget_v2 = engine.get_weight_streaming_automatic_budget()
            return engine

    def executions(self, engine: Any, spec: EngineSpec) -> dict[str, Execution]:
        """A way to run each profile, through contexts that hold no more memory than it needs."""
        return {
            profile.name: self._direct(engine, spec, self._allocation, index)
            for index, profile in enumerate(spec.profiles)
        }

    def captured(self, engine: Any, spec: EngineSpec, profile: str) -> Execution:
        """A way to run one profile through CUDA graphs.

        TensorRT-RTX compiles kernels while it runs and captures by itself, when that is done; the
        full TensorRT leaves it to us.
        """
        index = spec.profile_index(profile)
        if hasattr(self._trt, "CudaGraphStrategy"):
            config = engine.create_runtime_config()
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            config.set_execution_context_allocation_strategy(self._allocation)
            return self._direct(engine, spec, config, index)
        return CapturedExecution(
            lambda: self._direct(engine, spec, self._allocation, index), self._memory
        )

    @property
    def _allocation(self) -> Any:
        return self._trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE

    def _direct(self, engine: Any, spec: EngineSpec, options: Any, index: int) -> DirectExecution:
        """A new context, of an allocation strategy or a runtime configuration."""
        stream = self._memory.stream
        with self._log.recording() as errors:
            context = engine.create_execution_context(options)
            if context is None or not context.set_optimization_profile_async(index, stream):
                raise _failed(f"cannot prepare {spec.file}, for want of memory perhaps", errors)
        return DirectExecution(context, stream, spec, self._log)


def _failed(what: str, errors: list[str]) -> EngineError:
    return EngineError(
        f"TensorRT {what}",
        seen=quote(errors),
        fix="build the engines again on this machine: gap-export build BUNDLE",
    )
