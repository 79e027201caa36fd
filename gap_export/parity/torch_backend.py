"""The PyTorch reference behind the same interface as every other backend.

Sessions and the greedy loop are then the same code on both sides; only the maths differs. The
position remap is ``positions.gap_remap`` in numpy, so it is independent of the graph's node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gap_export.families import Reference
from gap_export.positions import gap_remap
from gap_export.runtime.backend import KVCache

FloatArray = NDArray[np.floating[Any]]
Int64Array = NDArray[np.int64]


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
    """

    def __init__(self, reference: Reference) -> None:
        self._reference = reference

    @property
    def name(self) -> str:
        """What runs, for reports."""
        return f"PyTorch {torch.__version__} (CPU)"

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
        return _run(encoder, input_ids)[0]

    def encode_image(
        self, pixel_values: NDArray[np.float32], text_embeds: FloatArray | None
    ) -> tuple[FloatArray, Int64Array]:
        """See Backend."""
        given = [pixel_values] if text_embeds is None else [pixel_values, text_embeds]
        features, keep = _run(self._reference.vision_encoder, *given)
        return features, keep

    def embed_tokens(self, input_ids: Int64Array) -> FloatArray:
        """See Backend."""
        return _run(self._reference.embed_tokens, input_ids)[0]

    def new_cache(self, batch_size: int) -> TorchCache:
        """See Backend."""
        spec = self._reference.decoder_spec
        empty = torch.zeros(batch_size, spec.num_key_value_heads, 0, spec.head_dim)
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
        given = [_tensor(a) for a in (inputs_embeds, attention_mask, original)]
        with torch.inference_mode():
            logits, *present = self._reference.decoder(*given, *cache.values)
        cache.values = present
        last: FloatArray = logits[:, -1].numpy()
        return last


def _run(module: torch.nn.Module, *arrays: NDArray[Any]) -> list[NDArray[Any]]:
    with torch.inference_mode():
        outputs = module(*map(_tensor, arrays))
    single = isinstance(outputs, torch.Tensor)
    return [tensor.numpy() for tensor in ([outputs] if single else outputs)]


def _tensor(array: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
