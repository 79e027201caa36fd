"""INT4 weights: quantized in blocks, one weight in memory at a time, into a file of their own.

A linear layer's weight [N, K] (out, in) is held as ONNX wants the second factor of a product,
[K, N], two values a byte, the first of them in the low half. Each ``block_size`` values along K
share a scale; zero is 0 (symmetric).

The scale is max|w| / 7 and the range -7..7, so that the largest weight of a block is held exactly.
With max|w| / 8 and -8..7, as the paper of AWQ has it, most values round finer, but the largest of
every other block shrinks by an eighth: on the demo model the squared error of the weights was 7 %
smaller, that of the logits 20 % larger.

Scales are rounded to what float32, float16 and bfloat16 all represent (8 significant bits, which
costs nothing measurable), so that graphs of any dtype compute with the very same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch

from gap_export.checkpoint.weights.placing import PlacedTensor, check_float, lay_out, new_file
from gap_export.checkpoint.weights.safetensors import read_header
from gap_export.checkpoint.weights.weight import (
    CHUNK,
    FLOAT_DTYPES,
    TORCH_DTYPES,
    Weight,
    is_finite,
    not_finite,
)
from gap_export.errors import CheckpointError, UsageError
from gap_export.spec.manifest.block_sizes import BLOCK_SIZES, check_block_size

QUANTIZED_NAME = "int4.safetensors"

_LARGEST = 7
# Float16 has 8 significant bits down to here. A block that would want a smaller scale holds nothing
# above 6e-5, and loses 4e-6 at most by this one.
_MIN_SCALE = 2.0**-17
# The largest number that both float16 and bfloat16 have.
_MAX_SCALE = 65280.0


@dataclass(frozen=True, kw_only=True)
class QuantizedPlace:
    """Where a quantized weight lies.

    Attributes:
        packed: Its values, U8 [K * N / 2], row-major over [K, N].
        scales: [K / block_size, N], by the safetensors name of their dtype.
        shape: (K, N): in, out.
        block_size: Values along K that share a scale.
    """

    packed: PlacedTensor
    scales: Mapping[str, PlacedTensor]
    shape: tuple[int, int]
    block_size: int


def check_blocks(weights: Mapping[str, Weight], *, block_size: int) -> None:
    """See that a block size serves every weight.

    Args:
        weights: Weights of linear layers, [N, K] (out, in), by name.
        block_size: Values along K that share a scale.

    Raises:
        CheckpointError: a weight is no float matrix, or an empty one.
        UsageError: a block size that is not offered, or that does not divide an input width.
    """
    check_block_size(block_size)
    for name, weight in weights.items():
        check_float(name, weight)
        if len(weight.shape) != 2 or 0 in weight.shape:
            raise CheckpointError(
                f"weight {name} cannot be quantized",
                seen=f"shape {list(weight.shape)}, {weight.origin}",
                allowed="a matrix [out, in]",
            )
    for name, weight in weights.items():
        if weight.shape[1] % block_size:
            raise _does_not_fit(name, weight, block_size, weights)


def store_quantized(
    path: Path,
    weights: Mapping[str, Weight],
    *,
    block_size: int,
    dtypes: Sequence[str],
    advance: Callable[[int], None] | None = None,
) -> dict[str, QuantizedPlace]:
    """Quantize weights into one safetensors file, holding one of them in memory at a time.

    Args:
        path: The new file; it is removed again where writing it fails.
        weights: Weights of linear layers, [N, K] (out, in), by name in the file.
        block_size: 32, 64 or 128, and a divisor of every K.
        dtypes: Safetensors names of the dtypes that scales are stored in.
        advance: Called with the bytes written since the last call.

    Returns:
        Where each lies; ``location`` is the file's name.

    Raises:
        CheckpointError: a weight cannot be read, is no float matrix, or is not finite.
        UsageError: the block size does not serve.
        OSError: the file is there already or cannot be written, or the disk has no room for it.
    """
    check_blocks(weights, block_size=block_size)
    places, header, stored = _lay_out(path.name, weights, block_size, dtypes)
    with new_file(path, header, stored.values()) as stream:
        for name, weight in weights.items():
            _write(stream, name, weight, places[name], advance or (lambda _: None))
    return places


def dequantize(file: Path, name: str) -> torch.Tensor:
    """Read a weight back as graphs compute with it.

    Args:
        file: From :func:`store_quantized`.
        name: The weight's name in it.

    Returns:
        float32 [N, K] (out, in), as the weight was.

    Raises:
        CheckpointError: the file is damaged, or holds no such weight.
    """
    refs = read_header(file)
    packed = refs.get(f"{name}.int4")
    found = [refs.get(_scales_name(name, dtype)) for dtype in FLOAT_DTYPES]
    held = next((ref for ref in found if ref is not None), None)
    if packed is None or held is None or len(held.shape) != 2:
        raise CheckpointError(
            f"no quantized weight {name}", seen=file, fix="export the bundle again"
        )
    scales = held.load().to(torch.float32)
    raw = packed.load()
    # An arithmetic shift brings the sign along; the low half goes up first.
    halves = torch.stack((raw << 4, raw), dim=1).view(torch.int8) >> 4
    values = halves.reshape(-1, scales.shape[1]).to(torch.float32)
    blocks = values.reshape(scales.shape[0], -1, scales.shape[1])
    return (blocks * scales.unsqueeze(1)).reshape(values.shape).T.contiguous()


def quantized_bytes(
    weights: Mapping[str, Weight], *, block_size: int, dtypes: Sequence[str]
) -> int:
    """Bytes that :func:`store_quantized` reports in all."""
    values = sum(math.prod(weight.shape) for weight in weights.values())
    item_bytes = sum(TORCH_DTYPES[dtype].itemsize for dtype in dtypes)
    return values // 2 + values // block_size * item_bytes


def quantize_columns(
    columns: torch.Tensor, *, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round some input columns of a weight to the nearest of their blocks' 15 values.

    Args:
        columns: float [N, k], finite; k is a multiple of ``block_size``.
        block_size: Values along k that share a scale.

    Returns:
        int8 [N, k / block_size, block_size] in -7..7, and the scales, float32
        [N, k / block_size, 1], of 8 significant bits, at most 65280 where the values allow it.
    """
    blocks = columns.to(torch.float32).reshape(columns.shape[0], -1, block_size)
    low, high = torch.aminmax(blocks, dim=2, keepdim=True)
    largest = torch.maximum(low.neg_(), high)
    # By way of float16, or a scale between two of its subnormals would be none of them.
    rounded = (largest / _LARGEST).to(torch.float16).to(torch.bfloat16).to(torch.float32)
    # A block of zeros has any scale but 0, since nothing can be divided by it.
    scales = torch.where(largest > 0, rounded.clamp_(min=_MIN_SCALE), 1.0)
    steps = (blocks / scales).round_().clamp_(-_LARGEST, _LARGEST)
    return steps.to(torch.int8), scales


def _does_not_fit(
    name: str, weight: Weight, block_size: int, weights: Mapping[str, Weight]
) -> UsageError:
    def fitting(widths: set[int]) -> list[int]:
        return [size for size in BLOCK_SIZES if all(width % size == 0 for width in widths)]

    width = weight.shape[1]
    here, all_over = fitting({width}), fitting({w.shape[1] for w in weights.values()})
    which = ", ".join(map(str, here)) or f"none of {', '.join(map(str, BLOCK_SIZES))}"
    return UsageError(
        f"an INT4 block of {block_size} does not divide the input of {name}",
        seen=f"width {width}",
        allowed=f"{which} for this layer",
        fix=f"use a block of {' or '.join(map(str, all_over))}, which fits every layer"
        if all_over
        else "no block fits every layer of this model; export it in a float dtype",
    )


def _lay_out(
    location: str, weights: Mapping[str, Weight], block_size: int, dtypes: Sequence[str]
) -> tuple[dict[str, QuantizedPlace], bytes, dict[str, PlacedTensor]]:
    """Places by weight, the file's first bytes, and everything in it in the file's order."""
    # The widest first: then all are aligned for any number of outputs.
    dtypes = sorted(set(dtypes), key=lambda dtype: -TORCH_DTYPES[dtype].itemsize)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {
        f"{name}.int4": ("U8", (math.prod(weight.shape) // 2,)) for name, weight in weights.items()
    }
    for dtype in dtypes:
        for name, weight in weights.items():
            rows, width = weight.shape
            tensors[_scales_name(name, dtype)] = dtype, (width // block_size, rows)
    header, stored = lay_out(location, tensors)
    places = {
        name: QuantizedPlace(
            packed=stored[f"{name}.int4"],
            scales=MappingProxyType({d: stored[_scales_name(name, d)] for d in dtypes}),
            shape=(weight.shape[1], weight.shape[0]),
            block_size=block_size,
        )
        for name, weight in weights.items()
    }
    return places, header, stored


def _scales_name(name: str, dtype: str) -> str:
    return f"{name}.scales.{FLOAT_DTYPES[dtype]}"


def _write(
    stream: BinaryIO,
    name: str,
    weight: Weight,
    place: QuantizedPlace,
    advance: Callable[[int], None],
) -> None:
    """Write one weight and its scales; of all that is made from it, pieces alone are in memory."""
    tensor = weight.load()
    scales = torch.empty((place.shape[0] // place.block_size, place.shape[1]))
    stream.seek(place.packed.offset)
    for start, stop in _pieces(place):
        columns = tensor[:, start:stop]
        if not is_finite(columns):
            raise not_finite(tensor, torch.float32, origin=f"{name} ({weight.origin})")
        steps, found = quantize_columns(columns, block_size=place.block_size)
        if float(found.max()) > _MAX_SCALE:
            raise CheckpointError(
                "a weight is too large for INT4 with float16 scales",
                seen=f"{name} ({weight.origin}), largest value {float(columns.abs().max()):g}",
                allowed=f"up to {_LARGEST * _MAX_SCALE:g}",
                fix="export it in a float dtype",
            )
        scales[start // place.block_size : stop // place.block_size] = found[..., 0].T
        advance(stream.write(_pack(steps).numpy().data))
    for dtype, held in place.scales.items():
        stream.seek(held.offset)
        raw = scales.to(TORCH_DTYPES[dtype]).reshape(-1).view(torch.uint8)
        advance(stream.write(raw.numpy().data))


def _pieces(place: QuantizedPlace) -> Iterator[tuple[int, int]]:
    """Ranges of K: whole blocks, about CHUNK values, and so a whole number of bytes."""
    width, rows = place.shape
    step = max(1, CHUNK // (rows * place.block_size)) * place.block_size
    for start in range(0, width, step):
        yield start, min(start + step, width)


def _pack(steps: torch.Tensor) -> torch.Tensor:
    """Int8 [N, blocks, block_size] to bytes of two values each, row-major over [k, N]."""
    flat = steps.reshape(steps.shape[0], -1).T.reshape(-1).view(torch.uint8)
    return (flat[0::2] & 0xF) | (flat[1::2] << 4)
