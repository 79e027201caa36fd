"""INT8 weights of linear layers: each output channel has a scale, and zero is 0 (symmetric).

A weight [N, K] (out, in) is held as ONNX's MatMulInteger takes it, [K, N]. The scale is
max|w| / 127 and the range -127..127, so that the largest weight of a channel is held exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from gap_export.checkpoint.weights.placing import PlacedTensor, check_float, lay_out, new_file
from gap_export.checkpoint.weights.weight import Weight, is_finite, not_finite

INT8_NAME = "int8.safetensors"
_LARGEST = 127


@dataclass(frozen=True, kw_only=True)
class Int8Place:
    """Where an INT8 weight lies.

    Attributes:
        values: I8 [K, N].
        scales: F32 [N].
    """

    values: PlacedTensor
    scales: PlacedTensor


def round_to_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each row to the nearest of its 255 values.

    Args:
        weight: float [N, K], finite.

    Returns:
        int8 [N, K] in -127..127, and the scales, float32 [N].
    """
    floats = weight.to(torch.float32)
    largest = floats.abs().amax(dim=1)
    # A row of zeros has any scale but 0, since nothing can be divided by it.
    scales = torch.where(largest > 0, largest / _LARGEST, 1.0)
    return (floats / scales[:, None]).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scales


def store_int8(
    path: Path, weights: Mapping[str, Weight], *, advance: Callable[[int], None]
) -> dict[str, Int8Place]:
    """Round weights into one safetensors file, holding one of them in memory at a time.

    Args:
        path: The new file; it is removed again where writing it fails.
        weights: Weights of linear layers, [N, K] (out, in), by name in the file.
        advance: Called with the number of values written since the last call.

    Returns:
        Where each lies; ``location`` is the file's name.

    Raises:
        CheckpointError: a weight cannot be read, is no float tensor, or is not finite.
        OSError: the file is there already or cannot be written, or the disk has no room for it.
    """
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, weight in weights.items():
        check_float(name, weight)
        # Scales first: four bytes each, all of them stay aligned.
        tensors[f"{name}.scales"] = "F32", (weight.shape[0],)
    tensors |= {f"{name}.int8": ("I8", weight.shape[::-1]) for name, weight in weights.items()}
    header, stored = lay_out(path.name, tensors)
    places = {
        name: Int8Place(values=stored[f"{name}.int8"], scales=stored[f"{name}.scales"])
        for name in weights
    }
    with new_file(path, header, stored.values()) as stream:
        for name, weight in weights.items():
            tensor = weight.load()
            if not is_finite(tensor):
                raise not_finite(tensor, torch.float32, origin=f"{name} ({weight.origin})")
            values, scales = round_to_int8(tensor)
            for place, part in (
                (places[name].scales, scales.view(torch.uint8)),
                (places[name].values, values.T.contiguous()),
            ):
                stream.seek(place.offset)
                stream.write(part.numpy().data)
            advance(math.prod(weight.shape))
    return places
