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
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle import Bundle
from gap_export.bundle.tensors import read_place
from gap_export.errors import BundleError, GapExportError, UsageError
from gap_export.runtime.backend import EncodedImage, FloatArray, KVCache, ScoredImage
from gap_export.runtime.onnxruntime_options import session_options, spare_memory, start_session
from gap_export.runtime.quiet_onnxruntime import ort, ort_errors
from gap_export.spec.manifest import GraphSpec, QuantizationSpec
from gap_export.spec.positions import Int64Array

if TYPE_CHECKING:
    from typing_extensions import Self

_CPU = "CPUExecutionProvider"
_CUDA = "CUDAExecutionProvider"
_SUPPORTED = (_CUDA, _CPU)
_DTYPES = ("float32", "float16")
_INPUT_DTYPES: Mapping[str, np.dtype[Any]] = {
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


class OnnxRuntimeBackend:
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
        self._dtype = numpy_dtype(manifest.dtype)
        self._decoder_spec = manifest.decoder
        self._quantization = manifest.graph("decoder_model_merged").quantization
        self._newline: FloatArray | None = None
        if manifest.newline is not None:
            self._newline = read_place(bundle.path, manifest.newline).astype(self._dtype)
        self._vision = self._load(bundle, "vision_encoder")
        self._token_pruner = (
            self._load(bundle, "token_pruner") if manifest.pruning.budget == "adaptive" else None
        )
        self._text = None if manifest.text_encoder is None else self._load(bundle, "text_encoder")
        self._embed = self._load(bundle, "embed_tokens")
        self._decoder = self._load(bundle, "decoder_model_merged")
        used = self._decoder.get_providers()
        self._device = "cuda" if _CUDA in used else "cpu"
        self._decoder_inputs = _input_dtypes(self._decoder)
        self._present_names = tuple(
            value.name for value in self._decoder.get_outputs() if value.name.startswith("present.")
        )

    @property
    def name(self) -> str:
        """What runs, for reports."""
        return f"ONNX Runtime {ort.__version__} ({self._decoder.get_providers()[0]})"

    @property
    def dtype(self) -> str:
        """See Backend."""
        return self._dtype.name

    @property
    def quantization(self) -> QuantizationSpec | None:
        """See Backend."""
        return self._quantization

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Free the graphs."""
        del self._vision, self._token_pruner, self._text, self._embed, self._decoder

    def encode_text(self, input_ids: Int64Array) -> FloatArray:
        """See Backend."""
        if self._text is None:
            raise UsageError("this bundle's pruner reads no text, so it has no text encoder")
        return self._run(self._text, ["text_embeds"], {"input_ids": input_ids})[0]

    def encode_image(
        self, pixel_values: NDArray[np.float32], text_embeds: FloatArray | None
    ) -> EncodedImage:
        """See Backend."""
        return EncodedImage(*self._see(pixel_values, text_embeds))

    def score_tokens(
        self, pixel_values: NDArray[np.float32], text_embeds: FloatArray | None
    ) -> ScoredImage:
        """See Backend."""
        return ScoredImage(*self._see(pixel_values, text_embeds))

    def prune_tokens(self, scored: ScoredImage, *, num_kept_tokens: int) -> EncodedImage:
        """See Backend."""
        if self._token_pruner is None:
            raise UsageError("this bundle keeps as many tokens of every picture")
        feed = scored.feed(num_kept_tokens=num_kept_tokens)
        return EncodedImage(
            *self._run(self._token_pruner, ["image_features", "keep_indices"], feed)
        )

    def _see(
        self, pixel_values: NDArray[np.float32], text_embeds: FloatArray | None
    ) -> list[NDArray[Any]]:
        """Outputs of the vision encoder, in the order its graph has them."""
        feed: dict[str, NDArray[Any]] = {"pixel_values": pixel_values}
        if text_embeds is not None:
            feed["text_embeds"] = text_embeds
        return self._run(self._vision, [value.name for value in self._vision.get_outputs()], feed)

    def image_newline(self) -> FloatArray:
        """See Backend."""
        if self._newline is None:
            raise UsageError("this bundle's pictures are not cut into tiles, so it has no newline")
        return self._newline

    def embed_tokens(self, input_ids: Int64Array) -> FloatArray:
        """See Backend."""
        return self._run(self._embed, ["inputs_embeds"], {"input_ids": input_ids})[0]

    def new_cache(self, batch_size: int) -> OnnxRuntimeCache:
        """See Backend."""
        spec = self._decoder_spec
        shape = (batch_size, spec.num_key_value_heads, 0, spec.head_dim)
        names = [_past_name(name) for name in self._present_names]
        return OnnxRuntimeCache(
            batch_size=batch_size,
            values={
                name: ort.OrtValue.ortvalue_from_numpy(
                    np.zeros(shape, dtype=self._decoder_inputs[name]), self._device
                )
                for name in names
            },
        )

    def decode(
        self,
        *,
        inputs_embeds: FloatArray,
        attention_mask: Int64Array,
        position_ids: Int64Array,
        kept_positions: Int64Array,
        cache: KVCache,
    ) -> FloatArray:
        """See Backend."""
        assert isinstance(cache, OnnxRuntimeCache), "a cache belongs to the backend that made it"
        binding = self._decoder.io_binding()
        feed = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "kept_positions": kept_positions,
        }
        # The binding reads these arrays in place: they must live, contiguous, until the run ends.
        held = {
            name: np.ascontiguousarray(array, dtype=self._decoder_inputs[name])
            for name, array in feed.items()
        }
        for name, array in held.items():
            binding.bind_cpu_input(name, array)
        for name, value in cache.values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in self._present_names:
            binding.bind_output(name, self._device)
        try:
            self._decoder.run_with_iobinding(binding)
        except ORT_ERRORS as err:
            raise _failed("decoder_model_merged", err) from err
        logits, *present = binding.get_outputs()
        cache.values = {
            _past_name(name): value
            for name, value in zip(self._present_names, present, strict=True)
        }
        cache.length += inputs_embeds.shape[1]
        last: FloatArray = logits.numpy()[:, -1].copy()
        return last

    def _load(self, bundle: Bundle, component: str) -> ort.InferenceSession:
        spec = bundle.manifest.graph(component)
        path = bundle.file(spec.file)
        try:
            session = self._start(path, spec, self._providers)
        except ORT_ERRORS as err:
            if self._providers == [_CPU]:
                raise _refused(spec, err) from err
            session = self._start_on_cpu(path, spec, why=err)
        wanted = self._providers[0]
        if not self._may_fall_back and wanted not in session.get_providers():
            raise _not_loaded(wanted, None)
        try:
            _check_interface(session, spec)
        except UnicodeDecodeError as err:
            raise _refused(spec, err) from err
        return session

    def _start(self, path: Path, spec: GraphSpec, providers: list[str]) -> ort.InferenceSession:
        options = session_options(self._num_threads)
        if spec.dtype == "float16" and providers == [_CPU]:
            spare_memory(options)
        return start_session(path, options, providers)

    def _start_on_cpu(self, path: Path, spec: GraphSpec, *, why: Exception) -> ort.InferenceSession:
        """A session without the GPU, which tells whether the graph or the GPU is at fault."""
        try:
            session = self._start(path, spec, [_CPU])
        except ORT_ERRORS as err:
            raise _refused(spec, err) from err
        if not self._may_fall_back:
            raise _not_loaded(self._providers[0], why) from why
        # The other graphs must not end up elsewhere than this one.
        self._providers = [_CPU]
        return session

    def _run(
        self, session: ort.InferenceSession, outputs: list[str], feed: Mapping[str, NDArray[Any]]
    ) -> list[NDArray[Any]]:
        dtypes = _input_dtypes(session)
        given = {name: array.astype(dtypes[name], copy=False) for name, array in feed.items()}
        try:
            found: list[NDArray[Any]] = session.run(outputs, given)
        except ORT_ERRORS as err:
            raise _failed(", ".join(outputs), err) from err
        return found


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


def _input_dtypes(session: ort.InferenceSession) -> dict[str, np.dtype[Any]]:
    """What a graph declares for each input."""
    return {value.name: _INPUT_DTYPES[value.type] for value in session.get_inputs()}


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
        if value.type not in _INPUT_DTYPES:
            raise BundleError(
                f"{spec.file} takes an input of a dtype that is not fed",
                seen=f"{value.name}: {value.type}",
                allowed=", ".join(_INPUT_DTYPES),
                fix="export with another dtype",
            )


def _refused(spec: GraphSpec, err: Exception) -> BundleError:
    return BundleError(
        f"ONNX Runtime {ort.__version__} refuses {spec.file}",
        seen=_first_line(err),
        fix="export the bundle again with this version of gap-export",
    )


def _not_loaded(provider: str, why: Exception | None) -> UsageError:
    return UsageError(
        "the execution provider could not be loaded",
        seen=provider if why is None else f"{provider} ({_first_line(why)})",
        allowed=f"{_CPU}, which always works",
        fix=f"check that the CUDA and cuDNN libraries are installed and found; {_CUDA_FIX}",
    )


def _past_name(present_name: str) -> str:
    return present_name.replace("present.", "past_key_values.", 1)


def _failed(where: str, err: Exception) -> GapExportError:
    return GapExportError(
        "ONNX Runtime failed while computing",
        seen=f"{where}: {_first_line(err)}",
        fix="check the bundle with: gap-export check BUNDLE",
    )


def _first_line(err: Exception) -> str:
    return (str(err).splitlines() or [type(err).__name__])[0]
