"""What a model's tensor is made of: bytes in a file, or a small computation over such bytes.

Nothing is read until :meth:`Weight.load`, and then only that one tensor. A family describes a 7B
model by a few hundred of these and no byte of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Protocol

import torch

from gap_export.errors import CheckpointError

# Safetensors' names of the dtypes a weight may have, and the manifest's.
FLOAT_DTYPES: Mapping[str, str] = MappingProxyType(
    {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
)
SAFETENSORS_NAMES: Mapping[str, str] = MappingProxyType({v: k for k, v in FLOAT_DTYPES.items()})
TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
# All that a file may hold and we can read; a model's own weights are of TORCH_DTYPES.
READABLE_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({
    **TORCH_DTYPES,
    "F64": torch.float64, "BOOL": torch.bool, "I8": torch.int8, "I16": torch.int16,
    "I32": torch.int32, "I64": torch.int64, "U8": torch.uint8, "U16": torch.uint16,
    "U32": torch.uint32, "U64": torch.uint64,
})  # fmt: skip

# Elements worked on at a time: few megabytes stay near the processor, and computing in float32
# with a weight of half a gigabyte needs no second gigabyte for its steps.
CHUNK = 1 << 20


class Weight(Protocol):
    """One tensor of a model, not yet read."""

    @property
    def dtype(self) -> str:
        """Safetensors name of what :meth:`load` gives, e.g. ``F16``."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions, row-major."""
        ...

    @property
    def origin(self) -> str:
        """Where it comes from, for messages."""
        ...

    def load(self) -> torch.Tensor:
        """Read or compute it, on the CPU, contiguous.

        Raises:
            CheckpointError: its bytes cannot be read, or its values do not fit its dtype.
        """
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class DerivedWeight:
    """A tensor computed from other weights: merged, split, joined, cast, filled.

    Compared by identity: two components that share one weight share the object.

    Attributes:
        dtype: Safetensors name of the result's dtype.
        shape: Shape of the result.
        sources: What :attr:`compute` is given, in order.
        compute: Pure; gets tensors in the dtypes of their files, which it must not write to.
        origin: In words, e.g. ``language_model...q_proj.weight + 0.25 B A``.
    """

    dtype: str
    shape: tuple[int, ...]
    sources: tuple[Weight, ...]
    compute: Callable[..., torch.Tensor] = field(repr=False)
    origin: str

    def load(self) -> torch.Tensor:
        """See :class:`Weight`."""
        tensor = self.compute(*(source.load() for source in self.sources))
        assert tuple(tensor.shape) == self.shape, f"{self.origin}: {list(tensor.shape)}"
        return cast_tensor(tensor.contiguous(), READABLE_DTYPES[self.dtype], origin=self.origin)


def cast_tensor(tensor: torch.Tensor, dtype: torch.dtype, *, origin: str) -> torch.Tensor:
    """Cast, and refuse what overflows.

    Args:
        tensor: Any shape, contiguous.
        dtype: Dtype of the result.
        origin: Where it comes from, for messages.

    Returns:
        A new tensor, or the given one where nothing is to be done.

    Raises:
        CheckpointError: a value of the result is not finite.
    """
    if tensor.dtype == dtype:
        return tensor
    result = torch.empty(tensor.shape, dtype=dtype)
    source, target = tensor.reshape(-1), result.reshape(-1)
    for start in range(0, source.numel(), CHUNK):
        piece = target[start : start + CHUNK].copy_(source[start : start + CHUNK])
        if not is_finite(piece):
            raise not_finite(tensor, dtype, origin=origin)
    return result


def is_finite(piece: torch.Tensor) -> bool:
    """Whether no value is infinite or not a number; meant for pieces of :data:`CHUNK` elements."""
    if not piece.is_floating_point() or not piece.numel():
        return True
    # One pass; a value that is not a number shows in either bound.
    low, high = torch.aminmax(piece)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def not_finite(tensor: torch.Tensor, dtype: torch.dtype, *, origin: str) -> CheckpointError:
    """The error for a tensor that holds, or as ``dtype`` would hold, values that are not finite."""
    name = str(dtype).removeprefix("torch.")
    flat = tensor.reshape(-1)
    pieces = [flat[start : start + CHUNK] for start in range(0, flat.numel(), CHUNK)]
    if not all(is_finite(piece) for piece in pieces):
        return CheckpointError(
            "a weight holds values that are not finite",
            seen=origin,
            fix="download or save the checkpoint again; training may have diverged",
        )
    largest = max(float(piece.abs().max()) for piece in pieces)
    wider = " or ".join(other for other in ("bfloat16", "float32") if other != name)
    return CheckpointError(
        f"a weight does not fit {name}",
        seen=f"{origin}, largest value {largest:g}",
        allowed=f"up to {torch.finfo(dtype).max:g}",
        fix=f"export with --dtype {wider}",
    )
