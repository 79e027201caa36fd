"""The PyTorch reference behind the same interface as every other backend.

Sessions and the greedy loop are then the same code on both sides; only the maths differs. The
position remap is ``positions.gap_remap`` in numpy, so it is independent of the graph's node.

It computes in the reference's own dtype; numpy has no bfloat16, so that leaves as float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gap_export.families import Reference
from gap_export.families.common.modules.pruned_vision import PrunedVisionEncoder
from gap_export.runtime.backend import EncodedImage, KVCache, ScoredImage
from gap_export.spec.manifest import QuantizationSpec
from gap_export.spec.positions import gap_remap

FloatArray = NDArray[np.floating[Any]]
Int64Array = NDArray[np.int64]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_METHODS: Mapping[str, str] = MappingProxyType(
    {
        "rtn": "which were rounded to nearest",
        "awq": "which AWQ scaled and were rounded to nearest",
    }
)


@dataclass
class TorchCache:
    """Keys and values of each layer in turn, [B, heads, length, dim]."""

    batch_size: int
    values: list[torch.Tensor] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Slots filled so far."""
        return int(self.values[0].shape[2])


class TorchBackend:
    """Runs a reference on the CPU.

    Args:
        reference: Built with real weights (``device="cpu"``).
        quantization: What :func:`use_quantized_weights` gave its decoder; None for nothing.
    """

    def __init__(
        self, reference: Reference, *, quantization: QuantizationSpec | None = None
    ) -> None:
        self._reference = reference
        self._quantization = quantization
        self._dtype = _DTYPES[reference.dtype]

    @property
    def name(self) -> str:
        """What runs, for reports."""
        name = f"PyTorch {torch.__version__} (CPU)"
        if self._quantization is None:
            return name
        return f"{name}, {_describe_quantized(self._quantization)}"

    @property
    def dtype(self) -> str:
        """The reference's."""
        return self._reference.dtype

    @property
    def quantization(self) -> QuantizationSpec | None:
        """See Backend."""
        return self._quantization

    def __enter__(self) -> TorchBackend:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing to free."""

    def encode_text(self, input_ids: Int64Array) -> FloatArray:
        """See Backend."""
        encoder = self._reference.text_encoder
        assert encoder is not None, "only a text-reading pruner's session asks for it"
        return _run(encoder, _tensor(input_ids))[0]

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
        pruner = self._reference.component("token_pruner").module
        slots = torch.arange(num_kept_tokens)
        scores, *parts = (_tensor(part) for part in scored if part is not None)
        return EncodedImage(*_run(pruner, slots, scores, *(part.to(self._dtype) for part in parts)))

    def margins(
        self, pixel_values: NDArray[np.float32], text_embeds: FloatArray | None
    ) -> NDArray[np.float32] | None:
        """By how much the closest choice of tokens was decided, float32 [B]; None if unknown."""
        encoder = self._reference.vision_encoder
        if not isinstance(encoder, PrunedVisionEncoder):
            return None
        with torch.inference_mode():
            found = encoder.margins(*self._seen(pixel_values, text_embeds))
        return None if found is None else _array(found.to(torch.float32))

    def _see(
        self, pixel_values: NDArray[np.float32], text_embeds: FloatArray | None
    ) -> list[NDArray[Any]]:
        return _run(self._reference.vision_encoder, *self._seen(pixel_values, text_embeds))

    def _seen(
        self, pixel_values: NDArray[np.float32], text_embeds: FloatArray | None
    ) -> list[torch.Tensor]:
        # Pixels are float32 in any case: casting them is the module's first step.
        given = [_tensor(pixel_values)]
        if text_embeds is not None:
            given.append(_tensor(text_embeds).to(self._dtype))
        return given

    def image_newline(self) -> FloatArray:
        """See Backend."""
        newline = self._reference.newline
        assert newline is not None, "only the session of a tiled model asks for it"
        return _array(newline)

    def embed_tokens(self, input_ids: Int64Array) -> FloatArray:
        """See Backend."""
        return _run(self._reference.embed_tokens, _tensor(input_ids))[0]

    def new_cache(self, batch_size: int) -> TorchCache:
        """See Backend."""
        spec = self._reference.decoder_spec
        shape = (batch_size, spec.num_key_value_heads, 0, spec.head_dim)
        empty = torch.zeros(shape, dtype=self._dtype)
        return TorchCache(batch_size=batch_size, values=[empty] * (2 * spec.num_layers))

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
        assert isinstance(cache, TorchCache), "a cache belongs to the backend that made it"
        original = gap_remap(position_ids, kept_positions)
        given = [
            _tensor(inputs_embeds).to(self._dtype),
            _tensor(attention_mask),
            _tensor(original),
        ]
        with torch.inference_mode():
            logits, *present = self._reference.decoder(*given, *cache.values)
        cache.values = present
        return _array(logits[:, -1])


def _run(module: torch.nn.Module, *given: torch.Tensor) -> list[NDArray[Any]]:
    with torch.inference_mode():
        outputs = module(*given)
    single = isinstance(outputs, torch.Tensor)
    return [_array(tensor) for tensor in ([outputs] if single else outputs)]


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _array(tensor: torch.Tensor) -> NDArray[Any]:
    tensor = tensor.detach()
    found: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found


def _describe_quantized(spec: QuantizationSpec) -> str:
    """What a reference computes with, for reports."""
    return (
        f"with the bundle's own {spec.dtype.upper()} weights in blocks of {spec.block_size}, "
        f"{_METHODS[spec.method]}"
    )
