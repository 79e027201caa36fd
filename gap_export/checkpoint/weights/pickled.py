"""PyTorch pickles (``.bin``, ``.pth``), read with ``weights_only=True`` alone.

Since PyTorch 1.6 such a file is a zip archive that holds each storage as it is in memory, so its
tensors can be pointed at like those of a safetensors file: the pickle itself is read without the
tensors' bytes, which is enough to know where they lie. Older files are read as a whole.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import reprlib
import struct
import warnings
import zipfile
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch._subclasses import fake_tensor

from gap_export.checkpoint.find.foreign import quantized
from gap_export.checkpoint.weights.files import (
    MAX_KEY,
    MAX_RANK,
    check_no_pointer,
    damaged,
    join_files,
    shard_files,
)
from gap_export.checkpoint.weights.safetensors import TensorRef, map_bytes
from gap_export.checkpoint.weights.weight import READABLE_DTYPES
from gap_export.errors import CheckpointError

PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"

_DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType(
    {dtype: name for name, dtype in READABLE_DTYPES.items()}
)
# How torch's unpickler names what it does not import.
_UNSAFE = re.compile(r"GLOBAL (\S+)")
# A stream of bytes that is no pickle can fail in any of these ways.
_FAILURES = (
    *(pickle.UnpicklingError, struct.error, EOFError, RuntimeError),
    *(ValueError, LookupError, TypeError, AttributeError, AssertionError, ArithmeticError),
)
_REASON = re.compile(r"WeightsUnpickler error:\s*(\S[^\n]*)")
_MAX_REASON = 200
_MAX_NAME_SHOWN = 100
_ARCHIVE, _OLD_FORMAT = b"PK\3\4", b"\x80"
# A state dict's pickle, without its tensors, takes 200 bytes a tensor.
_MAX_RECORD_BYTES = 16_000_000
# Where the header of each entry of an archive starts, ascending, and the bytes of its content.
Entries = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class PickledTensor:
    """A tensor of a pickle whose bytes are not plain: strided, or in a file of the old format.

    Attributes are those of :class:`TensorRef`; ``read`` gives the tensor, of any strides.
    """

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor] = field(repr=False)

    @property
    def origin(self) -> str:
        """See :class:`gap_export.checkpoint.weights.Weight`."""
        return f"{self.key} in {self.file}"

    def load(self) -> torch.Tensor:
        """See :class:`gap_export.checkpoint.weights.Weight`."""
        return self.read().contiguous()


def index_pickles(folder: Path) -> dict[str, TensorRef | PickledTensor]:
    """Every tensor of a checkpoint folder: one ``pytorch_model.bin``, or the files of its index.

    Raises:
        CheckpointError: as :func:`index_pickle`; no such file, shards missing, or a tensor in two.
    """
    if (folder / PICKLE_NAME).is_file():
        return index_pickle(folder / PICKLE_NAME)
    if not (folder / PICKLE_INDEX_NAME).is_file():
        raise CheckpointError(
            "no PyTorch weights in the checkpoint folder",
            seen=folder,
            allowed=f"{PICKLE_NAME}, or {PICKLE_INDEX_NAME} and its files",
        )
    return join_files(shard_files(folder / PICKLE_INDEX_NAME, suffix=".bin"), index_pickle)


def index_pickle(file: Path, *, entry: str | None = None) -> dict[str, TensorRef | PickledTensor]:
    """Every tensor of a pickled state dict. Numbers and None beside them hold no weight.

    Args:
        file: The pickle.
        entry: Key of the state dict where the file holds more, e.g. ``model``; where it is not
            there, the file's own top level is taken.

    Returns:
        By name. A tensor that lies plain in the file is a reference; none of its bytes is read.

    Raises:
        CheckpointError: missing, truncated, not a pickle of plain tensors (one that wants to run
            code is refused without running it), or no state dict.
    """
    entries = _read_directory(file)
    # Fake tensors have shapes and strides but no bytes, and know where those would be.
    with _quiet(), nullcontext() if entries is None else fake_tensor.FakeTensorMode():
        state = _state_dict(_load(file), file, entry)
        tensors = {key: _plain_tensor(value, key, file) for key, value in state.items()}
        return {
            key: PickledTensor(
                file=file,
                key=key,
                dtype=_DTYPE_NAMES[tensor.dtype],
                shape=tuple(tensor.shape),
                read=partial(torch.Tensor.contiguous, tensor),
            )
            if entries is None
            else _in_archive(tensor, key, file, entries)
            for key, tensor in tensors.items()
            if tensor is not None
        }


def _read_directory(file: Path) -> Entries | None:
    """The entries of an archive; None for a file that is read as a whole, which torch judges.

    Raises:
        CheckpointError: missing, a Git LFS pointer, or an archive with an entry that is compressed,
            as torch.save writes none, or larger than it can be: it is refused before it is
            unpacked.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
            check_no_pointer(file, start)
            size = stream.seek(0, os.SEEK_END)
        if not start.startswith((_ARCHIVE, _OLD_FORMAT)):
            shown = f"starts with {str(start[:24])[1:]}" if start else "is empty"
            raise damaged(file, f"not a PyTorch file: it {shown}")
        if not start.startswith(_ARCHIVE):
            return None
        with zipfile.ZipFile(file) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            for entry in entries:
                name, held = entry.filename[:_MAX_NAME_SHOWN], entry.file_size
                if entry.compress_type != zipfile.ZIP_STORED or held != entry.compress_size:
                    raise CheckpointError(
                        "the PyTorch file is compressed, which torch.save never does",
                        seen=f"{name!r} in {file}",
                        fix="save the checkpoint again, with torch.save or as safetensors",
                    )
                limit = size if "/data/" in entry.filename else min(size, _MAX_RECORD_BYTES)
                if held > limit:
                    raise damaged(file, f"{name!r} of {held} bytes in a file of {size}")
            orders = [e for e in entries if e.filename.partition("/")[2] == "byteorder"]
            if orders and archive.read(orders[0]) != b"little":
                return None
    except FileNotFoundError as err:
        raise CheckpointError("checkpoint file not found", seen=file) from err
    except OSError as err:
        raise CheckpointError("weight file cannot be read", seen=f"{file}: {err}") from err
    except (*_FAILURES, zipfile.BadZipFile) as err:
        raise damaged(file, f"not a whole zip archive: {err}") from err
    return tuple((entry.header_offset, entry.file_size) for entry in entries)


def _load(file: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as err:
        raise CheckpointError("weight file cannot be read", seen=f"{file}: {err}") from err
    except _FAILURES as err:
        unsafe = _UNSAFE.search(str(err))
        if unsafe is not None:
            raise CheckpointError(
                "refused: loading this file would execute code",
                seen=f"{file}: calls {unsafe[1][:_MAX_NAME_SHOWN]}",
                allowed="tensors, numbers and plain containers",
                fix="get the checkpoint as safetensors, or save its state dict alone",
            ) from err
        # What is around it is about the options of torch.load.
        found = _REASON.search(str(err))
        reason = found[1] if found is not None else (str(err).strip().splitlines() or [""])[0]
        raise damaged(
            file,
            f"not a PyTorch pickle of plain tensors: {type(err).__name__} {reason[:_MAX_REASON]}",
        ) from err


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch from saying on the side what the user cannot act on, or what an error says."""
    log = logging.getLogger(fake_tensor.__name__)
    with warnings.catch_warnings():
        # About protocols and deprecated storages.
        warnings.simplefilter("ignore")
        log.addFilter(_drop)
        try:
            yield
        finally:
            log.removeFilter(_drop)


def _drop(_: logging.LogRecord) -> bool:
    return False


def _state_dict(loaded: Any, file: Path, entry: str | None) -> dict[str, Any]:
    state, where = loaded, str(file)
    if entry is not None and isinstance(loaded, dict) and entry in loaded:
        state, where = loaded[entry], f"{entry!r} of {file}"
    if not isinstance(state, dict):
        raise CheckpointError(
            "the pickle holds no state dict",
            seen=f"{where}: {type(state).__name__}",
            allowed="a dict of tensors by name",
        )
    odd = [key for key in state if not isinstance(key, str) or len(key) > MAX_KEY]
    if odd:
        raise CheckpointError(
            "the pickle holds no state dict",
            seen=f"{where}: a key {reprlib.repr(odd[0])}",
            allowed="a dict of tensors by name",
        )
    return state


def _plain_tensor(value: Any, key: str, file: Path) -> torch.Tensor | None:
    """The tensor, or None for what holds no weight; all else is refused."""
    if value is None or isinstance(value, (bool, int, float)):
        return None
    if not isinstance(value, torch.Tensor):
        raise CheckpointError(
            "the pickle holds something else than tensors",
            seen=f"{key} in {file}: {type(value).__name__}",
            allowed="a dict of tensors by name",
        )
    if value.dtype.itemsize == 1 and value.dtype.is_floating_point:
        raise quantized("FP8", f"{key} in {file}: {value.dtype}")
    if value.layout != torch.strided or value.dtype not in _DTYPE_NAMES or value.is_neg():
        raise _odd_kind(key, f"{value.dtype}, {value.layout} in {file}")
    if value.is_meta:
        raise _odd_kind(key, f"no values, on device meta, in {file}")
    if value.ndim > MAX_RANK:
        raise _odd_kind(key, f"{value.ndim} dimensions in {file}")
    return value.detach()


def _odd_kind(key: str, seen: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {key} is of a kind that cannot be read",
        seen=seen,
        allowed=f"plain tensors of {', '.join(sorted(READABLE_DTYPES))}",
    )


def _in_archive(
    fake: torch.Tensor, key: str, file: Path, entries: Entries
) -> TensorRef | PickledTensor:
    """Where a fake tensor's bytes are, which must be within its own entry of the archive."""
    dtype, shape, strides = _DTYPE_NAMES[fake.dtype], tuple(fake.shape), tuple(fake.stride())
    # No public name, but the documented way: docs.pytorch.org/tutorials/unstable/gpu_direct_storage
    base = fake.untyped_storage()._checkpoint_offset  # noqa: SLF001
    if base is None:
        raise _odd_kind(key, f"not as it lies in {file}, but changed on loading")
    first = int(fake.storage_offset()) * fake.itemsize
    # Elements from the first to the last one, those between included.
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if fake.numel() else 0
    length = span * fake.itemsize
    # Its own entry is the last whose header comes before its bytes.
    if first + length > entries[bisect_left(entries, (base, 0)) - 1][1]:
        raise damaged(file, f"{key} is longer than its bytes")
    if fake.is_contiguous():
        return TensorRef(
            file=file, key=key, dtype=dtype, shape=shape, offset=base + first, length=length
        )

    def read() -> torch.Tensor:
        flat = map_bytes(file, base + first, length, fake.dtype, key=key)
        return flat.as_strided(shape, strides)

    return PickledTensor(file=file, key=key, dtype=dtype, shape=shape, read=read)
