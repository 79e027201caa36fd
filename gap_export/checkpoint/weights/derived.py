"""The computations that a family builds weights with; each is done when the result is loaded.

Sums are made in float32 and rounded once, to the dtype of the first operand. They go through a
large tensor in rows, so that a float32 copy of all of it never exists.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np
import torch

from gap_export.checkpoint.weights.safetensors import TensorRef
from gap_export.checkpoint.weights.weight import (
    CHUNK,
    TORCH_DTYPES,
    DerivedWeight,
    Weight,
    cast_tensor,
)
from gap_export.errors import CheckpointError

# Random weights are normal values drawn once, in pieces from places that are drawn per weight.
# Drawing all 7e9 values of a model would take minutes; copying takes as long as the disk.
_POOL_SIZE = 1 << 21
_PIECE = 1 << 16


def cast(weight: Weight, dtype: str) -> Weight:
    """The same values as another dtype; the very weight where it has that one already.

    Args:
        weight: Any shape.
        dtype: Safetensors name.

    Returns:
        A weight whose ``load`` refuses values that do not fit ``dtype``.
    """
    if weight.dtype == dtype:
        return weight
    return DerivedWeight(
        dtype=dtype,
        shape=weight.shape,
        sources=(weight,),
        compute=lambda tensor: tensor,
        origin=weight.origin,
    )


def add(a: Weight, b: Weight) -> DerivedWeight:
    """``a + b`` in the dtype of ``a``.

    Raises:
        CheckpointError: the shapes differ.
    """
    _check_shape(b, a.shape, beside=a)
    return add_rows(a, b)


def add_rows(delta: Weight, base: Weight) -> DerivedWeight:
    """``delta`` with ``base`` added to its first rows, in the dtype of ``delta``.

    Args:
        delta: [R,...]; rows beyond those of ``base`` stay as they are.
        base: [r,...] with r <= R.

    Raises:
        CheckpointError: ``base`` has more rows, or rows of another shape.
    """
    if not base.shape or not delta.shape or base.shape[0] > delta.shape[0]:
        _check_shape(base, delta.shape, beside=delta)
    else:
        _check_shape(base, (base.shape[0], *delta.shape[1:]), beside=delta)
    origin = f"{delta.origin} + {base.origin}"

    def compute(delta: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        if not delta.ndim:
            return cast_tensor(delta.float() + base.float(), delta.dtype, origin=origin)
        count = base.shape[0]

        def piece(start: int, stop: int) -> torch.Tensor:
            total = delta[start:stop].to(torch.float32, copy=True)
            total[: max(count - start, 0)] += base[start:stop].float()
            return total

        return _by_rows(piece, like=delta, origin=origin)

    return DerivedWeight(
        dtype=delta.dtype,
        shape=delta.shape,
        sources=(delta, base),
        compute=compute,
        origin=origin,
    )


def merge_lora(base: Weight, lora_a: Weight, lora_b: Weight, scale: float) -> DerivedWeight:
    """``base + scale * lora_b @ lora_a`` in the dtype of ``base``.

    Args:
        base: [M,N].
        lora_a: [R,N].
        lora_b: [M,R].
        scale: alpha / R, for most adapters.

    Raises:
        CheckpointError: the shapes do not fit each other.
    """
    rank = lora_a.shape[0] if lora_a.shape else 0
    if len(base.shape) != 2:
        raise CheckpointError(
            "an adapter belongs to a matrix", seen=f"{base.origin} of shape {list(base.shape)}"
        )
    _check_shape(lora_a, (rank, base.shape[1]), beside=base)
    _check_shape(lora_b, (base.shape[0], rank), beside=lora_a)
    origin = f"{base.origin} + {scale:g} * {lora_b.origin} @ {lora_a.origin}"

    def compute(base: torch.Tensor, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        down = down.float()

        def piece(start: int, stop: int) -> torch.Tensor:
            rows = base[start:stop].float()
            return torch.addmm(rows, up[start:stop].float(), down, alpha=scale)

        return _by_rows(piece, like=base, origin=origin)

    return DerivedWeight(
        dtype=base.dtype,
        shape=base.shape,
        sources=(base, lora_a, lora_b),
        compute=compute,
        origin=origin,
    )


def rows(weight: Weight, start: int, stop: int) -> Weight:
    """Rows ``start`` to ``stop`` of the first axis; bytes in a file stay that.

    Raises:
        CheckpointError: there are no such rows.
    """
    if not weight.shape or not 0 <= start <= stop <= weight.shape[0]:
        raise CheckpointError(
            f"a weight has no rows {start} to {stop}",
            seen=f"{weight.origin} of shape {list(weight.shape)}",
        )
    shape = (stop - start, *weight.shape[1:])
    if isinstance(weight, TensorRef):
        row = weight.length // weight.shape[0] if weight.shape[0] else 0
        return replace(
            weight,
            key=f"{weight.key}[{start}:{stop}]",
            shape=shape,
            offset=weight.offset + start * row,
            length=(stop - start) * row,
        )
    return DerivedWeight(
        dtype=weight.dtype,
        shape=shape,
        sources=(weight,),
        compute=lambda tensor: tensor[start:stop],
        origin=f"{weight.origin}[{start}:{stop}]",
    )


def reshaped(weight: Weight, shape: tuple[int, ...]) -> Weight:
    """The same values, row-major, in another shape; bytes in a file stay that.

    Raises:
        CheckpointError: the shape has another number of elements.
    """
    if math.prod(shape) != math.prod(weight.shape):
        raise CheckpointError(
            f"a weight does not reshape to {list(shape)}",
            seen=f"{weight.origin} of shape {list(weight.shape)}",
        )
    if isinstance(weight, TensorRef):
        return replace(weight, shape=shape)
    return DerivedWeight(
        dtype=weight.dtype,
        shape=shape,
        sources=(weight,),
        compute=lambda tensor: tensor.reshape(shape),
        origin=weight.origin,
    )


def filled(shape: tuple[int, ...], value: float, dtype: str) -> DerivedWeight:
    """One value everywhere, for what a checkpoint leaves to its default."""
    return DerivedWeight(
        dtype=dtype,
        shape=shape,
        sources=(),
        compute=lambda: torch.full(shape, value, dtype=TORCH_DTYPES[dtype]),
        origin=f"all {value:g}",
    )


def random_normal(shape: tuple[int, ...], *, std: float, seed: int, dtype: str) -> DerivedWeight:
    """Normal values, always the same for one seed and shape.

    Made to be written as fast as a disk takes them: values recur within a large weight, in an order
    that does not. Good for timing and for shapes, not for training.

    Args:
        shape: Shape of the result.
        std: Standard deviation; the mean is 0.
        seed: One for each weight, so that two of a model are not the same.
        dtype: Safetensors name.
    """
    origin = f"random values of seed {seed}"

    def compute() -> torch.Tensor:
        digest = hashlib.sha256(f"{seed} {shape}".encode()).digest()
        places = np.random.default_rng(list(digest))
        pool = cast_tensor(_pool() * std, TORCH_DTYPES[dtype], origin=origin)
        flat = torch.empty(math.prod(shape), dtype=pool.dtype)
        for start in range(0, flat.numel(), _PIECE):
            piece = flat[start : start + _PIECE]
            place = int(places.integers(_POOL_SIZE - _PIECE))
            piece.copy_(pool[place : place + piece.numel()])
        return flat.reshape(shape)

    return DerivedWeight(dtype=dtype, shape=shape, sources=(), compute=compute, origin=origin)


@lru_cache(maxsize=1)
def _pool() -> torch.Tensor:
    """Standard normal values, float32 [2M]."""
    drawn = np.random.default_rng(0).standard_normal(_POOL_SIZE, dtype=np.float32)
    return torch.from_numpy(drawn)


def _by_rows(
    piece: Callable[[int, int], torch.Tensor], *, like: torch.Tensor, origin: str
) -> torch.Tensor:
    """Compute a tensor in pieces of rows [start, stop), each cast to the dtype of ``like``."""
    result = torch.empty(like.shape, dtype=like.dtype)
    step = max(1, CHUNK // max(1, like[:1].numel()))
    for start in range(0, like.shape[0], step):
        rows = piece(start, start + step)
        result[start : start + step] = cast_tensor(rows, like.dtype, origin=origin)
    return result


def _check_shape(weight: Weight, shape: tuple[int, ...], *, beside: Weight) -> None:
    if weight.shape != shape:
        raise CheckpointError(
            "two weights do not go together",
            seen=f"{weight.origin} of shape {list(weight.shape)}",
            allowed=f"shape {list(shape)}, to go with {beside.origin} of {list(beside.shape)}",
            fix="use the checkpoints that belong together",
        )
