"""The PyTorch reference behind the same interface as every other backend.

Sessions and the greedy loop are then the same code on both sides; only the maths differs. The
position remap is ``positions.gap_remap`` in numpy, so it is independent of the graph's node.

It computes in the reference's own dtype; numpy has no bfloat16, so that leaves as float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gap_export.checkpoint.weights import SAFETENSORS_NAMES, TORCH_DTYPES
from gap_export.families import Component, Reference
from gap_export.families.common.modules.pruned_vision import PrunedVisionEncoder
from gap_export.runtime.backends.backend import (
    DECODER,
    NEWLINE,
    VISION,
    Backend,
    Feed,
    FloatArray,
    KVCache,
    Outputs,
)
from gap_export.spec.manifest import QuantizationSpec
from gap_export.spec.positions import gap_remap

_PAST = "past_key_values."
_METHODS: Mapping[str, str] = MappingProxyType(
    {
        "rtn": "which were rounded to nearest",
        "awq": "which AWQ scaled and were rounded to nearest",
    }
)


@dataclass
class TorchCache:
    """Keys and values of the layers, [B, heads, length, dim], by the decoder's input names."""

    batch_size: int
    values: dict[str, torch.Tensor]

    @property
    def length(self) -> int:
        """Slots filled so far."""
        return int(next(iter(self.values.values())).shape[2])


class TorchBackend(Backend):
    """Runs a reference on the CPU.

    Args:
        reference: Built with real weights (``device="cpu"``).
        quantization: What :func:`use_quantized_weights` gave its decoder; None for nothing.
    """

    continues_prompts = True

    def __init__(
        self, reference: Reference, *, quantization: QuantizationSpec | None = None
    ) -> None:
        self._reference = reference
        self.dtype = reference.dtype
        self.quantization = quantization
        self.name = f"PyTorch {torch.__version__} (CPU)"
        if quantization is not None:
            self.name += (
                f", with the bundle's own {quantization.dtype.upper()} weights in blocks of "
                f"{quantization.block_size}, {_METHODS[quantization.method]}"
            )

    def run(self, component: str, feed: Feed) -> Outputs:
        """See Backend."""
        if component == NEWLINE:
            newline = self._reference.newline
            assert newline is not None, "only the session of a tiled model asks for it"
            return {"image_newline": to_numpy(newline)}
        part = self._reference.component(component)
        return {name: to_numpy(found) for name, found in _run(part, to_torch(part, feed)).items()}

    def margins(self, feed: Feed) -> NDArray[np.float32] | None:
        """By how much the closest choice of tokens was decided, float32 [B]; None if unknown."""
        part = self._reference.component(VISION)
        if not isinstance(part.module, PrunedVisionEncoder):
            return None
        with torch.inference_mode():
            found = part.module.margins(*to_torch(part, feed).values())
        return None if found is None else to_numpy(found.to(torch.float32))

    def new_cache(self, batch_size: int, num_slots: int) -> TorchCache:
        """See Backend; each step makes its cache anew, so no memory is had ahead."""
        del num_slots
        spec = self._reference.decoder_spec
        dtype = TORCH_DTYPES[SAFETENSORS_NAMES[self.dtype]]
        empty = torch.zeros((batch_size, spec.num_key_value_heads, 0, spec.head_dim), dtype=dtype)
        inputs = self._reference.component(DECODER).inputs
        names = [tensor.name for tensor in inputs if tensor.name.startswith(_PAST)]
        return TorchCache(batch_size=batch_size, values=dict.fromkeys(names, empty))

    def fork_cache(self, cache: KVCache, batch_size: int, num_slots: int) -> TorchCache:
        """See Backend; all rows share the values, which no step writes to."""
        del num_slots
        assert isinstance(cache, TorchCache), "a cache belongs to the backend that made it"
        assert cache.batch_size == 1, "what is forked is one row"
        values = {n: value.expand(batch_size, -1, -1, -1) for n, value in cache.values.items()}
        return TorchCache(batch_size=batch_size, values=values)

    def decode(self, feed: Feed, cache: KVCache) -> FloatArray:
        """See Backend."""
        assert isinstance(cache, TorchCache), "a cache belongs to the backend that made it"
        part = self._reference.component(DECODER)
        outputs = _run(part, to_torch(part, feed) | cache.values)
        cache.values = {n: outputs[n.replace(_PAST, "present.", 1)] for n in cache.values}
        return to_numpy(outputs["logits"][:, -1])


def to_torch(component: Component, feed: Feed) -> dict[str, torch.Tensor]:
    """A component's inputs that are fed, in its module's order, as its module takes them.

    The position ids are remapped here, apart from the graph's own node, and a number of tokens to
    keep becomes their slots. Inputs that are not fed, such as a cache, are left out.
    """
    given = dict(feed)
    if "position_ids" in given:
        given["position_ids"] = gap_remap(given["position_ids"], given["kept_positions"])
    if "num_kept_tokens" in given:
        given["kept_slots"] = np.arange(int(given["num_kept_tokens"][0]))
    found = {}
    for spec in component.inputs:
        if spec.name in given:
            tensor = torch.from_numpy(np.ascontiguousarray(given[spec.name]))
            name = SAFETENSORS_NAMES.get(spec.dtype)
            found[spec.name] = tensor if name is None else tensor.to(TORCH_DTYPES[name])
    return found


def to_numpy(tensor: torch.Tensor) -> NDArray[Any]:
    """A tensor's values; bfloat16 as float32."""
    tensor = tensor.detach()
    found: NDArray[Any] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return found


def _run(component: Component, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        outputs = component.module(*(given[spec.name] for spec in component.inputs))
    tensors = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    return {spec.name: found for spec, found in zip(component.outputs, tensors, strict=True)}
