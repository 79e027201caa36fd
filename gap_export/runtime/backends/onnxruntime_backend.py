"""Runs a bundle's graphs in ONNX Runtime, on the CPU or, where it is present, on CUDA.

The KV cache stays where it was computed: each step's ``present`` outputs are bound as the next
step's ``past`` inputs, without a copy through numpy.

ONNX Runtime's CPU has no float16 arithmetic: it casts to float32 and back, so float16 graphs run
there, slowly. See :func:`spare_memory` for what keeps their weights from being held twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gap_export.bundle import Bundle
from gap_export.bundle.tensors import read_place
from gap_export.errors import BundleError, GapExportError, UsageError
from gap_export.runtime.backends.backend import (
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
from gap_export.runtime.backends.onnxruntime_options import (
    session_options,
    spare_memory,
    start_session,
)
from gap_export.runtime.backends.quiet_onnxruntime import ort, ort_errors
from gap_export.spec.manifest import GraphSpec, Manifest

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_SUPPORTED = (_CUDA, _CPU)
_DTYPES = ("float32", "float16")
INPUT_DTYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype("float32"),
    "tensor(float16)": np.dtype("float16"),
    "tensor(int64)": np.dtype("int64"),
}
# Both packages hold the same module, so the one for the CPU must go first.
_CUDA_FIX = (
    "onnxruntime-gpu takes the place of onnxruntime: pip uninstall -y onnxruntime && "
    "pip install onnxruntime-gpu"
)
# All that ONNX Runtime raises: classes with no common base, RuntimeError from bound runs, and
# UnicodeDecodeError where a name in a graph, also one that it complains of, is not UTF-8.
ORT_ERRORS: tuple[type[Exception], ...] = (
    RuntimeError,
    UnicodeDecodeError,
    *(
        value
        for value in vars(ort_errors).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ),
)


@dataclass
class OnnxRuntimeCache:
    """Keys and values as ONNX Runtime holds them.

    Attributes:
        batch_size: B.
        length: Slots filled.
        values: past_key_values.{i}.key|value by input name, [B, heads, length, dim].
    """

    batch_size: int
    length: int = 0
    values: dict[str, ort.OrtValue] = field(default_factory=dict)


class OnnxRuntimeGraphs(Backend):
    """Graphs that are loaded already, in ONNX Runtime.

    Args:
        sessions: By component; the decoder's logits come first among its outputs.
        manifest: Describes the model.
    """

    continues_prompts = True

    def __init__(self, sessions: dict[str, ort.InferenceSession], manifest: Manifest) -> None:
        decoder = sessions[DECODER]
        used = decoder.get_providers()
        self.name = f"ONNX Runtime {ort.__version__} ({used[0]})"
        self.dtype = numpy_dtype(manifest.dtype).name
        self._manifest = manifest
        self._sessions = sessions
        self._inputs = {
            component: {value.name: INPUT_DTYPES[value.type] for value in session.get_inputs()}
            for component, session in sessions.items()
        }
        self._device = "cuda" if _CUDA in used else "cpu"
        self._past = {
            value.name.replace("present.", "past_key_values.", 1): value.name
            for value in decoder.get_outputs()
            if value.name.startswith("present.")
        }

    def close(self) -> None:
        """Free the graphs."""
        self._sessions.clear()

    def run(self, component: str, feed: Feed) -> Outputs:
        """See Backend."""
        session = self._sessions.get(component)
        if session is None:
            raise lacks_component(component, self._manifest)
        dtypes = self._inputs[component]
        given = {name: array.astype(dtypes[name], copy=False) for name, array in feed.items()}
        names = [value.name for value in session.get_outputs()]
        try:
            return dict(zip(names, session.run(names, given), strict=True))
        except ORT_ERRORS as err:
            raise _failed(component, err) from err

    def new_cache(self, batch_size: int, num_slots: int) -> OnnxRuntimeCache:
        """See Backend; each step makes its cache anew, so no memory is had ahead."""
        del num_slots
        spec = self._manifest.decoder
        shape = (batch_size, spec.num_key_value_heads, 0, spec.head_dim)
        return OnnxRuntimeCache(
            batch_size=batch_size,
            values={
                name: ort.OrtValue.ortvalue_from_numpy(
                    np.zeros(shape, dtype=self._inputs[DECODER][name]), self._device
                )
                for name in self._past
            },
        )

    def fork_cache(self, cache: KVCache, batch_size: int, num_slots: int) -> OnnxRuntimeCache:
        """See Backend. A single row shares the values, which no step writes to."""
        del num_slots
        assert isinstance(cache, OnnxRuntimeCache), "a cache belongs to the backend that made it"
        assert cache.batch_size == 1, "what is forked is one row"
        values = dict(cache.values)
        if batch_size > 1:
            for name, value in values.items():
                rows = np.repeat(value.numpy(), batch_size, axis=0)
                values[name] = ort.OrtValue.ortvalue_from_numpy(rows, self._device)
        return OnnxRuntimeCache(batch_size=batch_size, length=cache.length, values=values)

    def decode(self, feed: Feed, cache: KVCache) -> FloatArray:
        """See Backend."""
        assert isinstance(cache, OnnxRuntimeCache), "a cache belongs to the backend that made it"
        session, dtypes = self._sessions[DECODER], self._inputs[DECODER]
        binding = session.io_binding()
        # The binding reads these arrays in place: they must live, contiguous, until the run ends.
        held = {
            name: np.ascontiguousarray(array, dtype=dtypes[name]) for name, array in feed.items()
        }
        for name, array in held.items():
            binding.bind_cpu_input(name, array)
        for name, value in cache.values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in self._past.values():
            binding.bind_output(name, self._device)
        try:
            session.run_with_iobinding(binding)
        except ORT_ERRORS as err:
            raise _failed(DECODER, err) from err
        logits, *present = binding.get_outputs()
        cache.values = dict(zip(self._past, present, strict=True))
        cache.length += feed["inputs_embeds"].shape[1]
        last: FloatArray = logits.numpy()[:, -1].copy()
        return last


class OnnxRuntimeBackend(OnnxRuntimeGraphs):
    """The bundle's base graphs in ONNX Runtime."""

    def __init__(
        self,
        bundle: Bundle,
        execution_providers: Sequence[str] | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Load the graphs.

        Args:
            bundle: An opened, that is checked, bundle.
            execution_providers: ONNX Runtime's names, best first; by default CUDA where this
                ONNX Runtime has it, then the CPU.
            num_threads: Threads of one operator; by default ONNX Runtime decides.

        Raises:
            UsageError: an execution provider that is not supported, that this ONNX Runtime has
                not got, or, where it was asked for, that cannot be loaded; a number of threads
                out of range.
            BundleError: a graph that ONNX Runtime refuses, or whose inputs are not the manifest's,
                a dtype other than float32 and float16, or a newline that cannot be read.
        """
        manifest = bundle.manifest
        self._providers = _choose_providers(execution_providers)
        self._may_fall_back = execution_providers is None
        self._num_threads = num_threads
        dtype = numpy_dtype(manifest.dtype)
        self.quantization = manifest.graph(DECODER).quantization
        self.activations = manifest.graph(DECODER).activations
        self._newline: FloatArray | None = None
        if manifest.newline is not None:
            self._newline = read_place(bundle.path, manifest.newline).astype(dtype)
        components = graph_components(manifest)
        super().__init__({name: self._load(bundle, name) for name in components}, manifest)

    def run(self, component: str, feed: Feed) -> Outputs:
        """See Backend."""
        if component == NEWLINE and self._newline is not None:
            return {"image_newline": self._newline}
        return super().run(component, feed)

    def _load(self, bundle: Bundle, component: str) -> ort.InferenceSession:
        spec = bundle.manifest.graph(component)
        path = bundle.file(spec.file)
        try:
            session = self._start(path, spec, self._providers)
        except ORT_ERRORS as err:
            if self._providers == [_CPU]:
                raise _refused(spec, err) from err
            # Without the GPU it shows whether the graph or the GPU is at fault.
            try:
                session = self._start(path, spec, [_CPU])
            except ORT_ERRORS as fault:
                raise _refused(spec, fault) from fault
            if not self._may_fall_back:
                raise _not_loaded(self._providers[0], err) from err
            # The other graphs must not end up elsewhere than this one.
            self._providers = [_CPU]
        wanted = self._providers[0]
        if not self._may_fall_back and wanted not in session.get_providers():
            raise _not_loaded(wanted, None)
        try:
            _check_interface(session, spec)
        except UnicodeDecodeError as err:
            raise _refused(spec, err) from err
        return session

    def _start(self, path: Path, spec: GraphSpec, providers: list[str]) -> ort.InferenceSession:
        options = session_options(self._num_threads, activations=spec.activations)
        # What few weights of an INT4 graph are floats may be cast when it is opened.
        if spec.dtype == "float16" and providers == [_CPU] and spec.quantization is None:
            spare_memory(options)
        return start_session(path, options, providers)


def _choose_providers(wanted: Sequence[str] | None) -> list[str]:
    available = ort.get_available_providers()
    if wanted is None:
        return [name for name in (_CUDA, _CPU) if name in available]
    usable = [name for name in _SUPPORTED if name in available]
    unsupported = [name for name in wanted if name not in _SUPPORTED]
    if unsupported or not wanted:
        raise UsageError(
            "execution provider not supported",
            seen=", ".join(unsupported) or "none given",
            allowed=", ".join(usable),
        )
    missing = [name for name in wanted if name not in available]
    if missing:
        raise UsageError(
            "execution provider not available",
            seen=", ".join(missing),
            allowed=", ".join(usable),
            fix=f"for CUDA: {_CUDA_FIX}" if _CUDA in missing else None,
        )
    return list(dict.fromkeys(wanted))


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of a bundle's floats.

    Raises:
        BundleError: ONNX Runtime does not run graphs of it.
    """
    # numpy knows bfloat16 only where some other package happens to have taught it.
    if name not in _DTYPES:
        raise BundleError(
            "this runtime cannot run the bundle's dtype",
            seen=name,
            allowed=", ".join(_DTYPES),
            fix="export with another dtype",
        )
    return np.dtype(name)


def _check_interface(session: ort.InferenceSession, spec: GraphSpec) -> None:
    for kind, declared, found in (
        ("inputs", spec.inputs, session.get_inputs()),
        ("outputs", spec.outputs, session.get_outputs()),
    ):
        if {value.name for value in declared} != {value.name for value in found}:
            raise BundleError(
                f"{kind} of {spec.file} are not the manifest's",
                seen=", ".join(sorted(value.name for value in found)),
                allowed=", ".join(sorted(value.name for value in declared)),
                fix="export the bundle again",
            )
    for value in session.get_inputs():
        if value.type not in INPUT_DTYPES:
            raise BundleError(
                f"{spec.file} takes an input of a dtype that is not fed",
                seen=f"{value.name}: {value.type}",
                allowed=", ".join(INPUT_DTYPES),
                fix="export with another dtype",
            )


def _refused(spec: GraphSpec, err: Exception) -> BundleError:
    return BundleError(
        f"ONNX Runtime {ort.__version__} refuses {spec.file}",
        seen=first_line(err),
        fix="export the bundle again with this version of gap-export",
    )


def _not_loaded(provider: str, why: Exception | None) -> UsageError:
    return UsageError(
        "the execution provider could not be loaded",
        seen=provider if why is None else f"{provider} ({first_line(why)})",
        allowed=f"{_CPU}, which always works",
        fix=f"check that the CUDA and cuDNN libraries are installed and found; {_CUDA_FIX}",
    )


def _failed(where: str, err: Exception) -> GapExportError:
    return GapExportError(
        "ONNX Runtime failed while computing",
        seen=f"{where}: {first_line(err)}",
        fix="check the bundle with: gap-export check BUNDLE",
    )


def first_line(err: Exception) -> str:
    """What ONNX Runtime says, without the rest of it."""
    return (str(err).splitlines() or [type(err).__name__])[0]
