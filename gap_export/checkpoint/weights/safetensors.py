"""Safetensors by reference: where each tensor's bytes lie, without reading one of them.

An export need not load weights; the ONNX files point into the checkpoint by offset. So this module
reads headers, which safetensors itself checks, and maps the bytes of one tensor when it is loaded.
Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header,
tensor bytes without holes).
"""

from __future__ import annotations

import math
import mmap
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from gap_export.checkpoint.weights.files import (
    MAX_KEY,
    MAX_RANK,
    check_no_pointer,
    damaged,
    join_files,
    parse_json_object,
    shard_files,
)
from gap_export.checkpoint.weights.weight import READABLE_DTYPES
from gap_export.errors import CheckpointError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_MAX_SIZE = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class TensorRef:
    """Where one tensor's bytes lie, plain and contiguous.

    Attributes:
        file: A safetensors file, or a PyTorch pickle that stores its tensors uncompressed.
        key: Its name in the file.
        dtype: Safetensors name, e.g. ``F32``.
        shape: Dimensions, row-major.
        offset: Where its first byte is, from the start of the file.
        length: In bytes.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int

    @property
    def origin(self) -> str:
        """See :class:`gap_export.checkpoint.weights.Weight`."""
        return f"{self.key} in {self.file}"

    def load(self) -> torch.Tensor:
        """See :class:`gap_export.checkpoint.weights.Weight`."""
        return read_tensor(self)


def index_checkpoint(folder: Path) -> dict[str, TensorRef]:
    """Every tensor of a checkpoint folder: one ``model.safetensors``, or the files of its index.

    Raises:
        CheckpointError: the folder or its weights are missing, damaged, or named twice.
    """
    if not folder.is_dir():
        raise CheckpointError(
            "checkpoint folder not found",
            seen=folder,
            allowed="a folder with config.json and model.safetensors",
        )
    if (folder / WEIGHTS_NAME).is_file():
        return index_files([folder / WEIGHTS_NAME])
    if (folder / INDEX_NAME).is_file():
        return index_files(shard_files(folder / INDEX_NAME, suffix=".safetensors"))
    raise CheckpointError(
        "no weights in the checkpoint folder",
        seen=folder,
        allowed=f"{WEIGHTS_NAME}, or {INDEX_NAME} and its files",
        fix="convert other formats with transformers' save_pretrained first",
    )


def index_files(files: Iterable[Path]) -> dict[str, TensorRef]:
    """Every tensor of several safetensors files.

    Raises:
        CheckpointError: a file is missing or damaged, or two of them hold one key.
    """
    return join_files(files, read_header)


def read_header(file: Path) -> dict[str, TensorRef]:
    """Where the tensors of one file lie, once the format's own reader has accepted its header.

    Raises:
        CheckpointError: missing, a Git LFS pointer, or not a whole safetensors file.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
            check_no_pointer(file, start)
            # It refuses a header that is damaged, or does not fit the file byte for byte.
            with safe_open(file, framework="pt"):
                pass
            header_length = int.from_bytes(start[:8], "little")
            stream.seek(8)
            header = parse_json_object(file, stream.read(header_length))
    except SafetensorError as err:
        raise damaged(file, str(err)) from err
    except OSError as err:
        raise CheckpointError("weight file cannot be read", seen=f"{file}: {err}") from err
    header.pop("__metadata__", None)
    refs = {}
    for key, entry in header.items():
        if len(key) > MAX_KEY:
            raise damaged(file, f"a tensor with a name of {len(key)} characters, {key[:100]!r}...")
        shape = entry["shape"]
        strange = len(shape) > MAX_RANK or max(shape, default=0) > _MAX_SIZE
        if strange or set(entry) != _ENTRY_KEYS:
            raise damaged(file, f"entry {key!r} is {reprlib.repr(entry)}")
        first, end = entry["data_offsets"]
        refs[key] = TensorRef(
            file=file,
            key=key,
            dtype=entry["dtype"],
            shape=tuple(shape),
            offset=8 + header_length + first,
            length=end - first,
        )
    return refs


def read_tensor(ref: TensorRef) -> torch.Tensor:
    """Map one tensor's bytes into memory; the disk is read where they are touched.

    The mapping is private: writing to the tensor changes no file. It goes with the tensor, so that
    walking through a checkpoint keeps no more of it resident than is in use.

    Returns:
        On the CPU, contiguous, of the dtype in the file.

    Raises:
        CheckpointError: torch has no such dtype, or the file shrank or cannot be read.
    """
    if ref.dtype not in READABLE_DTYPES:
        raise CheckpointError(
            f"tensor {ref.key} has a dtype that cannot be read",
            seen=f"{ref.dtype} in {ref.file}",
            allowed=", ".join(sorted(READABLE_DTYPES)),
        )
    dtype = READABLE_DTYPES[ref.dtype]
    assert ref.length == math.prod(ref.shape) * dtype.itemsize, ref
    if not ref.length:
        return torch.empty(ref.shape, dtype=dtype)
    return map_bytes(ref.file, ref.offset, ref.length, dtype, key=ref.key).reshape(ref.shape)


def map_bytes(
    file: Path, offset: int, length: int, dtype: torch.dtype, *, key: str
) -> torch.Tensor:
    """Map bytes of a file, copy-on-write.

    Args:
        file: Any file.
        offset: Where the first byte is.
        length: In bytes, not 0, a multiple of the dtype's.
        dtype: What they are read as.
        key: What they are, for messages.

    Returns:
        The values, one after the other.

    Raises:
        CheckpointError: the file is shorter, or cannot be read.
    """
    # A mapping starts at a page.
    start = offset - offset % mmap.ALLOCATIONGRANULARITY
    try:
        with file.open("rb") as stream:
            size = stream.seek(0, 2)
            if offset + length > size:
                raise damaged(file, f"{key} ends at byte {offset + length} of {size}")
            # One tensor at a time: a private mapping of a whole checkpoint may be refused where
            # it is larger than the memory, though next to nothing of it is ever resident.
            mapped = mmap.mmap(
                stream.fileno(), offset + length - start, access=mmap.ACCESS_COPY, offset=start
            )
    except (OSError, ValueError) as err:
        # ValueError: the file shrank in between.
        raise CheckpointError("weight file cannot be read", seen=f"{file}: {err}") from err
    flat = torch.frombuffer(mapped, dtype=torch.uint8)[offset - start :]
    # Headers of odd length are legal; loads from odd addresses are not, everywhere.
    aligned = flat if flat.data_ptr() % dtype.itemsize == 0 else flat.clone()
    return aligned.view(dtype)
