"""Runs a bundle's graphs in ONNX Runtime, on the CPU or, where it is present, on CUDA.

Of a component's forms the fastest is taken that the execution provider runs: on the CPU ``ort``,
made of ONNX Runtime's own operators, where the bundle has it. Elsewhere that has not been measured,
and it must be asked for.

ONNX Runtime's CPU has no float16 arithmetic: it casts to float32 and back, so float16 graphs run
there, slowly. See :func:`spare_memory` for what keeps their weights from being held twice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from gap_export.bundle import Bundle, Verify
from gap_export.bundle.tensors import read_place
from gap_export.errors import BundleError, GapExportError, UsageError
from gap_export.runtime.backends.backend import (
    DECODER,
    NEWLINE,
    VISION,
    Backend,
    Feed,
    FloatArray,
    KVCache,
    Outputs,
    graph_components,
    lacks_component,
)
from gap_export.runtime.backends.kept_graphs import start_kept
from gap_export.runtime.backends.onnxruntime_growing import GrowingDecoder
from gap_export.runtime.backends.onnxruntime_in_place import InPlaceDecoder
from gap_export.runtime.backends.onnxruntime_options import (
    ORT_ERRORS,
    session_options,
    spare_memory,
    start_session,
)
from gap_export.runtime.backends.quiet_onnxruntime import ort
from gap_export.spec.manifest import BASE, ORT, FormName, GraphSpec, Manifest, check_form

SLOW_ON_A_CPU = (
    "a CPU casts every weight of float16 graphs at every step: for a CPU export with --for cpu"
)
_log = logging.getLogger(__name__)
_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_SUPPORTED = (_CUDA, _CPU)
_DTYPES = ("float32", "float16")
INPUT_DTYPES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype("float32"),
    "tensor(float16)": np.dtype("float16"),
    "tensor(int64)": np.dtype("int64"),
}
# GroupQueryAttention of ONNX Runtime 1.19 takes several tokens behind others for the beginning of a
# prompt, and answers about an image that was looked at before are wrong.
_CONTINUES_FROM = (1, 20)
# Both packages hold the same module, so the one for the CPU must go first.
_CUDA_FIX = (
    "onnxruntime-gpu takes the place of onnxruntime: pip uninstall -y onnxruntime && "
    "pip install onnxruntime-gpu"
)


class OnnxRuntimeGraphs(Backend):
    """Graphs that are loaded already, in ONNX Runtime.

    Args:
        sessions: By component; the decoder's logits come first among its outputs.
        manifest: Describes the model.
        kv_contract: How the decoder's graph hands its cache on, see ``GraphSpec``.
    """

    continues_prompts = True

    def __init__(
        self,
        sessions: dict[str, ort.InferenceSession],
        manifest: Manifest,
        *,
        kv_contract: Literal["none", "concat", "in_place"] = "concat",
    ) -> None:
        decoder = sessions[DECODER]
        used = decoder.get_providers()
        own = ", form ort" if kv_contract == "in_place" else ""
        self.name = f"ONNX Runtime {ort.__version__} ({used[0]}{own})"
        self.dtype = numpy_dtype(manifest.dtype).name
        self._manifest = manifest
        self._sessions = sessions
        self._inputs = {
            component: {value.name: INPUT_DTYPES[value.type] for value in session.get_inputs()}
            for component, session in sessions.items()
        }
        device, dtypes = "cuda" if _CUDA in used else "cpu", self._inputs[DECODER]
        spec = manifest.decoder
        size = spec.num_key_value_heads, spec.head_dim
        self._decoder: Any = (
            InPlaceDecoder(decoder, device, dtypes, (*size, spec.vocab_size))
            if kv_contract == "in_place"
            else GrowingDecoder(decoder, device, dtypes, size)
        )
        self.num_logits = self._decoder.num_logits

    def close(self) -> None:
        """Free the graphs."""
        self._sessions.clear()
        # It holds the decoder's graph, the largest, and buffers.
        self._decoder = None

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

    def new_cache(self, batch_size: int, num_slots: int) -> KVCache:
        """See Backend."""
        cache: KVCache = self._decoder.new_cache(batch_size, num_slots)
        return cache

    def fork_cache(self, cache: KVCache, batch_size: int, num_slots: int) -> KVCache:
        """See Backend."""
        assert cache.batch_size == 1, "what is forked is one row"
        made: KVCache = self._decoder.fork_cache(cache, batch_size, num_slots)
        return made

    def decode(self, feed: Feed, cache: KVCache) -> FloatArray:
        """See Backend."""
        return self._decode(self._decoder.decode, feed, cache)

    def decode_each(self, feed: Feed, cache: KVCache) -> FloatArray:
        """See Backend."""
        if self.num_logits == 1:
            return super().decode_each(feed, cache)
        return self._decode(self._decoder.decode_each, feed, cache)

    @staticmethod
    def _decode(run: Callable[[Feed, Any], FloatArray], feed: Feed, cache: KVCache) -> FloatArray:
        try:
            return run(feed, cache)
        except ORT_ERRORS as err:
            raise _failed(DECODER, err) from err


class OnnxRuntimeBackend(OnnxRuntimeGraphs):
    """The bundle's graphs in ONNX Runtime.

    Attributes:
        forms: By component, the lowering of the graph that runs, see ``GraphSpec``.
    """

    def __init__(
        self,
        bundle: Bundle,
        execution_providers: Sequence[str] | None = None,
        num_threads: int | None = None,
        *,
        form: FormName | None = None,
        verify: Verify = "stamp",
        kept_graph_bytes: int | None = None,
    ) -> None:
        """Load the graphs.

        Args:
            bundle: An opened, that is checked, bundle.
            execution_providers: ONNX Runtime's names, best first; by default CUDA where this
                ONNX Runtime has it, then the CPU.
            num_threads: Threads of one operator; by default ONNX Runtime decides.
            form: ``base`` or ``ort``, of the components that have it; by default the fastest that
                runs. Where one does not run, the base form takes its place, with a warning.
            verify: ``full`` hashes optimized graphs that are kept again.
            kept_graph_bytes: The most that such graphs may take, see ``kept_graphs``.

        Raises:
            UsageError: an execution provider that is not supported, that this ONNX Runtime has
                not got, or, where it was asked for, that cannot be loaded; a number of threads
                out of range; a form that no component has or that does not run, asked for.
            BundleError: a graph that ONNX Runtime refuses, or whose inputs are not the manifest's,
                a dtype other than float32 and float16, or a newline that cannot be read.
        """
        manifest = bundle.manifest
        self._providers = _choose_providers(execution_providers)
        self._may_fall_back = execution_providers is None
        self._num_threads = num_threads
        self._keeping: Any = {"verify": verify, "max_bytes": kept_graph_bytes}
        dtype = numpy_dtype(manifest.dtype)
        self.quantization = manifest.graph(DECODER).quantization
        self.activations = manifest.graph(DECODER).activations
        self._newline: FloatArray | None = None
        if manifest.newline is not None:
            self._newline = read_place(bundle.path, manifest.newline).astype(dtype)
        components = graph_components(manifest)
        check_form(manifest, form)
        self._form = form
        self.forms: dict[str, str] = {}
        sessions = {name: self._load(bundle, name) for name in components}
        contract = manifest.graph(DECODER, lowering=self.forms[DECODER]).kv_contract
        super().__init__(sessions, manifest, kv_contract=contract)

    def run(self, component: str, feed: Feed) -> Outputs:
        """See Backend."""
        if component == NEWLINE and self._newline is not None:
            return {"image_newline": self._newline}
        return super().run(component, feed)

    def _load(self, bundle: Bundle, component: str) -> ort.InferenceSession:
        """A component's graph in the best of its forms that runs."""
        manifest, form = bundle.manifest, self._form
        may_be_own = form == ORT or (form is None and self._providers == [_CPU])
        own = [g for g in manifest.graphs if (g.component, g.lowering) == (component, ORT)]
        if own and may_be_own:
            spec = own[0]
            try:
                if spec.kv_contract == "in_place":
                    _check_continues()
                session = self._load_graph(bundle, spec)
            except BundleError as err:
                if form is not None:
                    raise UsageError(
                        f"the form ort of {component} does not run here",
                        seen=f"{err.what}: {err.seen}",
                        fix="use the base form, or another version of ONNX Runtime",
                    ) from err
                _log.warning(
                    "the faster form of %s is not used, the base form is: %s", component, err
                )
            else:
                self.forms[component] = ORT
                return session
        self.forms[component] = BASE
        return self._load_graph(bundle, manifest.graph(component))

    def _load_graph(self, bundle: Bundle, spec: GraphSpec) -> ort.InferenceSession:
        try:
            session = self._start(bundle, spec, self._providers)
        except ORT_ERRORS as err:
            if self._providers == [_CPU]:
                raise _refused(spec, err) from err
            # Without the GPU it shows whether the graph or the GPU is at fault.
            try:
                session = self._start(bundle, spec, [_CPU])
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

    def _start(self, bundle: Bundle, spec: GraphSpec, providers: list[str]) -> ort.InferenceSession:
        def options() -> ort.SessionOptions:
            return session_options(self._num_threads, activations=spec.activations)

        path = bundle.file(spec.file)
        if providers != [_CPU]:
            return start_session(path, options(), providers)
        # What few weights of an INT4 graph are floats may be cast when it is opened.
        if spec.dtype == "float16" and spec.quantization is None:
            if spec.component == DECODER:
                _log.warning("%s", SLOW_ON_A_CPU)
            spared = options()
            spare_memory(spared)
            return start_session(path, spared, providers)
        # A decoder of floats would take twice its many gigabytes of the user's disk.
        if spec.quantization is not None or spec.component == VISION:
            kept = start_kept(bundle, spec, options, **self._keeping)
            if kept is not None:
                return kept
        return start_session(path, options(), providers)


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


def _check_continues() -> None:
    """See that this ONNX Runtime continues a prompt in the form ``ort``.

    Raises:
        BundleError: it is too old.
    """
    release = tuple(int(number) for number in ort.__version__.split(".")[:2])
    if release < _CONTINUES_FROM:
        raise BundleError(
            "its GroupQueryAttention cannot continue a prompt",
            seen=f"onnxruntime {ort.__version__}",
            allowed=f">= {'.'.join(map(str, _CONTINUES_FROM))}",
        )


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
