"""Where a bundle's graphs find their weights, and the file for those that are not taken as is."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from gap_export.bundle.files import reserve_space
from gap_export.checkpoint.weights.safetensors import TensorRef
from gap_export.checkpoint.weights.weight import (
    CHUNK,
    READABLE_DTYPES,
    TORCH_DTYPES,
    Weight,
    is_finite,
    not_finite,
)
from gap_export.errors import CheckpointError

# The format asks for 8; whole cache lines let a reader map the file and use it as it is.
_ALIGNMENT = 64


@dataclass(frozen=True, kw_only=True)
class PlacedTensor:
    """A weight as a graph's external data.

    Attributes:
        location: File name beside the graph.
        dtype: Safetensors name.
        shape: Dimensions.
        offset: Where its first byte is in the file.
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
        advance: Called with the bytes written since the last call.

    Returns:
        Where each lies; ``location`` is the file's name.

    Raises:
        CheckpointError: a weight cannot be read, is no float tensor, or is not finite once cast.
        OSError: the file is there already or cannot be written, or the disk has no room for it.
    """
    distinct: dict[str, Weight] = {}
    first_of: dict[int, str] = {}
    for name, weight in weights.items():
        check_float(name, weight)
        if first_of.setdefault(id(weight), name) == name:
            distinct[name] = weight
    header, stored = lay_out(
        path.name, {name: (dtype, weight.shape) for name, weight in distinct.items()}
    )
    with new_file(path, header, stored.values()) as stream:
        for name, weight in distinct.items():
            assert stream.tell() == stored[name].offset, name
            _write(stream, name, weight, TORCH_DTYPES[dtype], advance)
    return {name: stored[first_of[id(weight)]] for name, weight in weights.items()}


def lay_out(
    location: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]
) -> tuple[bytes, dict[str, PlacedTensor]]:
    """The first bytes of a safetensors file, and where each tensor goes behind them.

    Args:
        location: Name of the file beside the graph.
        tensors: Safetensors dtype and shape by name, in the order of the file.
    """
    ends: dict[str, tuple[int, int]] = {}
    cursor = 0
    for name, (dtype, shape) in tensors.items():
        length = math.prod(shape) * READABLE_DTYPES[dtype].itemsize
        ends[name] = cursor, cursor + length
        cursor += length
    entries = {
        name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(ends[name])}
        for name, (dtype, shape) in tensors.items()
    }
    raw = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    raw += b" " * (-(8 + len(raw)) % _ALIGNMENT)
    start = 8 + len(raw)
    placed = {
        name: PlacedTensor(
            location=location,
            dtype=dtype,
            shape=shape,
            offset=start + ends[name][0],
            length=ends[name][1] - ends[name][0],
        )
        for name, (dtype, shape) in tensors.items()
    }
    return struct.pack("<Q", len(raw)) + raw, placed


@contextmanager
def new_file(path: Path, header: bytes, placed: Iterable[PlacedTensor]) -> Iterator[BinaryIO]:
    """Open a file that :func:`lay_out` laid out, behind its header and with room for all of it.

    Torch keeps to one thread meanwhile.

    Args:
        path: The file; it is removed again where writing it fails.
        header: Its first bytes.
        placed: All that goes into it.

    Raises:
        OSError: the file is there already or cannot be written, or the disk has no room for it.
    """
    try:
        with path.open("xb") as stream, _single_thread():
            end = max((place.offset + place.length for place in placed), default=0)
            reserve_space(stream, max(end, len(header)))
            stream.write(header)
            yield stream
    except FileExistsError:
        raise
    except BaseException:
        with suppress(OSError):
            path.unlink()
        raise


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


def check_float(name: str, weight: Weight) -> None:
    """Refuse a weight that is no float tensor.

    Raises:
        CheckpointError: it is not.
    """
    if weight.dtype not in (*TORCH_DTYPES, "F64"):
        raise CheckpointError(
            f"weight {name} is not of a float dtype",
            seen=f"{weight.dtype}, {weight.origin}",
            allowed="F16, BF16, F32, F64",
        )


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
