"""Where a bundle's graphs find their weights, and the file for those that are not taken as is."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from gap_export.bundle.files import reserve_space
from gap_export.errors import CheckpointError
from gap_export.weights.safetensors import TensorRef
from gap_export.weights.weight import (
    CHUNK,
    TORCH_DTYPES,
    Weight,
    is_finite,
    not_finite,
)

# The format asks for 8; whole cache lines let a reader map the file and use it as it is.
_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class PlacedTensor:
    """A weight as a graph's external data.

    Attributes:
        location: File name beside the graph.
        dtype: Safetensors name.
        shape: Dimensions.
        offset: Of its first byte in the file.
        length: In bytes.
    """

    location: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def place_reference(ref: TensorRef, location: str) -> PlacedTensor:
    """Point at a tensor that stays where it is.

    Args:
        ref: The tensor.
        location: Name of its file beside the graph.
    """
    return PlacedTensor(
        location=location, dtype=ref.dtype, shape=ref.shape, offset=ref.offset, length=ref.length
    )


def store_weights(
    path: Path,
    weights: Mapping[str, Weight],
    *,
    dtype: str,
    advance: Callable[[int], None] | None = None,
) -> dict[str, PlacedTensor]:
    """Write weights into one safetensors file, holding one of them in memory at a time.

    Names that share one weight object share its bytes; the file knows it by the first of them.

    Args:
        path: The new file; it is removed again where writing it fails.
        weights: By name in the file.
        dtype: Safetensors name all of them are cast to.
        advance: Told the bytes written since the last call.

    Returns:
        Where each lies; ``location`` is the file's name.

    Raises:
        CheckpointError: a weight cannot be read, is no float tensor, or is not finite once cast.
        OSError: the file is there already or cannot be written, or the disk has no room for it.
    """
    header, placed, distinct = _lay_out(path.name, weights, dtype)
    try:
        with path.open("xb") as stream, _single_thread():
            end = max((place.offset + place.length for place in placed.values()), default=0)
            reserve_space(stream, max(end, len(header)))
            stream.write(header)
            for name, weight in distinct.items():
                assert stream.tell() == placed[name].offset, name
                _write(stream, name, weight, TORCH_DTYPES[dtype], advance)
    except FileExistsError:
        raise
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise
    return placed


@contextmanager
def _single_thread() -> Iterator[None]:
    """Keep torch to one thread.

    One is faster than a disk. Two wait for each other after every piece, which takes fifty times as
    long where hashing in the background has the other core.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _lay_out(
    location: str, weights: Mapping[str, Weight], dtype: str
) -> tuple[bytes, dict[str, PlacedTensor], dict[str, Weight]]:
    """The file's first bytes, where every weight goes, and the distinct ones in file order."""
    ends: dict[str, tuple[int, int]] = {}
    first_names: dict[int, str] = {}
    distinct: dict[str, Weight] = {}
    cursor = 0
    for name, weight in weights.items():
        if weight.dtype not in (*TORCH_DTYPES, "F64"):
            raise CheckpointError(
                f"weight {name} is not of a float dtype",
                seen=f"{weight.dtype}, {weight.origin}",
                allowed="F16, BF16, F32, F64",
            )
        known = first_names.setdefault(id(weight), name)
        if known == name:
            length = math.prod(weight.shape) * TORCH_DTYPES[dtype].itemsize
            ends[name] = cursor, cursor + length
            distinct[name] = weight
            cursor += length
        else:
            ends[name] = ends[known]
    entries = {
        name: {"dtype": dtype, "shape": list(weight.shape), "data_offsets": list(ends[name])}
        for name, weight in distinct.items()
    }
    raw = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
    start = 8 + len(raw)
    placed = {
        name: PlacedTensor(
            location=location,
            dtype=dtype,
            shape=weight.shape,
            offset=start + ends[name][0],
            length=ends[name][1] - ends[name][0],
        )
        for name, weight in weights.items()
    }
    return struct.pack("<Q", len(raw)) + raw, placed, distinct


def _write(
    stream: BinaryIO,
    name: str,
    weight: Weight,
    dtype: torch.dtype,
    advance: Callable[[int], None] | None,
) -> None:
    """Write one weight in pieces; only the weight itself is ever whole in memory."""
    tensor = weight.load()
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), CHUNK):
        piece = flat[start : start + CHUNK].to(dtype)
        if not is_finite(piece):
            raise not_finite(tensor, dtype, origin=f"{name} ({weight.origin})")
        written = stream.write(piece.view(torch.uint8).numpy().data)
        if advance is not None:
            advance(written)
