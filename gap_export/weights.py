"""Safetensors by reference: where each tensor's bytes lie, without reading one of them.

An export never loads weights; the ONNX files point into the checkpoint by offset. So this module
reads headers only, with bounds on everything a damaged or hostile file could claim.
Format: https://huggingface.co/docs/safetensors (8-byte little-endian header length, JSON header,
tensor bytes without holes).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import CheckpointError

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# The format's own reader refuses more as well.
_MAX_HEADER_BYTES = 100_000_000
_ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2,
    "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_NUMPY_DTYPES: Mapping[str, str] = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "I16": "<i2", "U16": "<u2", "F16": "<f2", "I32": "<i4",
    "U32": "<u4", "F32": "<f4", "I64": "<i8", "U64": "<u8", "F64": "<f8",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TensorRef:
    """Where one tensor lies.

    Attributes:
        file: The safetensors file.
        key: Its name in the file.
        dtype: Safetensors name, e.g. ``F32``.
        shape: Dimensions, row-major.
        offset: Of its first byte, from the start of the file.
        length: In bytes.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


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
        return index_files(_shards(folder))
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
    refs: dict[str, TensorRef] = {}
    for file in files:
        for key, ref in read_header(file).items():
            if key in refs:
                raise CheckpointError(
                    "a tensor is in two weight files",
                    seen=f"{key} in {refs[key].file.name} and {file.name}",
                )
            refs[key] = ref
    return refs


def read_header(file: Path) -> dict[str, TensorRef]:
    """Parse and check one file's header; no tensor byte is read.

    Raises:
        CheckpointError: missing, truncated, not safetensors, a header longer than the file or than
            100 MB, an unknown dtype, a length that does not fit the shape, or offsets that overlap,
            leave holes or leave the file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            header_length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 2 <= header_length <= min(_MAX_HEADER_BYTES, size - 8):
                raise _damaged(
                    file,
                    f"header of {header_length} bytes in a file of {size}"
                    if header_length >= 0
                    else f"{size} bytes in all",
                )
            raw = stream.read(header_length)
    except OSError as err:
        raise CheckpointError("weight file cannot be read", seen=f"{file}: {err}") from err
    header = _parse_json(file, raw)
    header.pop("__metadata__", None)
    data_start = 8 + header_length
    refs = {key: _entry(file, key, value, data_start) for key, value in header.items()}
    _check_layout(file, refs.values(), start=data_start, end=size)
    return refs


def read_tensor(ref: TensorRef) -> NDArray[Any]:
    """Read one tensor's bytes, for the PyTorch reference only.

    Raises:
        CheckpointError: numpy has no such dtype, or the file shrank.
    """
    if ref.dtype not in _NUMPY_DTYPES:
        raise CheckpointError(
            f"tensor {ref.key} has a dtype that cannot be read",
            seen=ref.dtype,
            allowed=", ".join(sorted(_NUMPY_DTYPES)),
        )
    count = math.prod(ref.shape)
    try:
        flat = np.fromfile(ref.file, dtype=_NUMPY_DTYPES[ref.dtype], count=count, offset=ref.offset)
    except OSError as err:
        raise CheckpointError("weight file cannot be read", seen=f"{ref.file}: {err}") from err
    if flat.size != count:
        raise _damaged(ref.file, f"{ref.key} ends after {flat.size} of {count} values")
    return flat.reshape(ref.shape)


def read_json_object(file: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint, such as its config.json.

    Raises:
        CheckpointError: missing, unreadable, or not a JSON object.
    """
    try:
        raw = file.read_bytes()
    except FileNotFoundError as err:
        raise CheckpointError("checkpoint file not found", seen=file) from err
    except OSError as err:
        raise CheckpointError("checkpoint file cannot be read", seen=f"{file}: {err}") from err
    return _parse_json(file, raw)


def _shards(folder: Path) -> list[Path]:
    weight_map = read_json_object(folder / INDEX_NAME).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise _damaged(folder / INDEX_NAME, "no weight_map of file names")
    names = sorted(set(weight_map.values()))
    for name in names:
        # An index must not make us read files outside its folder.
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise _damaged(folder / INDEX_NAME, f"weight file named {name!r}")
    return [folder / name for name in names]


def _parse_json(file: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        plain = dict(pairs)
        if len(plain) != len(pairs):
            raise ValueError("a key occurs twice")
        return plain

    try:
        parsed = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as err:
        raise _damaged(file, f"JSON does not parse: {err}") from err
    if not isinstance(parsed, dict):
        raise _damaged(file, f"a JSON {type(parsed).__name__} where an object belongs")
    return parsed


def _entry(file: Path, key: str, value: Any, data_start: int) -> TensorRef:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(file, f"entry {key!r} is {value!r}"[:200])
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise _damaged(file, f"{key} has dtype {dtype!r}"[:200])
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise _damaged(file, f"{key} has shape {shape!r} at {offsets!r}"[:200])
    length = offsets[1] - offsets[0]
    if length != math.prod(shape) * _ITEM_BYTES[dtype]:
        raise _damaged(file, f"{key}: {length} bytes for {dtype} {shape}")
    return TensorRef(
        file=file,
        key=key,
        dtype=dtype,
        shape=tuple(shape),
        offset=data_start + offsets[0],
        length=length,
    )


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _check_layout(file: Path, refs: Iterable[TensorRef], *, start: int, end: int) -> None:
    cursor = start
    for ref in sorted(refs, key=lambda r: (r.offset, r.length)):
        if ref.offset != cursor:
            word = "overlaps the tensor before it" if ref.offset < cursor else "follows a hole"
            raise _damaged(file, f"{ref.key} {word}")
        cursor += ref.length
    if cursor != end:
        raise _damaged(file, f"tensors end at byte {cursor} of {end}")


def _damaged(file: Path, seen: str) -> CheckpointError:
    return CheckpointError(
        "weight file is damaged or not what it should be",
        seen=f"{file}: {seen}",
        fix="download or save the checkpoint again",
    )
