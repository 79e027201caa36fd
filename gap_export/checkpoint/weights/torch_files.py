"""What a file that is said to be PyTorch's is, told from its bytes before anything unpickles it."""

from __future__ import annotations

import pickletools
import struct
import zipfile
from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gap_export.checkpoint.weights.files import check_no_pointer, damaged
from gap_export.errors import CheckpointError

# Of the old format's magic number, which is the first thing pickled in such a file.
_OLD_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
_START_BYTES = 64
_STARTS_SHOWN = 24
# A state dict's pickle, without its tensors, takes 200 bytes a tensor.
_MAX_RECORD_BYTES = 16_000_000
# Enough of another pickle to see what it calls.
_PICKLE_BYTES = 1 << 16
_MAX_NAME_SHOWN = 100
# A damaged archive can fail in any of these ways.
_ZIP_FAILURES = (
    *(zipfile.BadZipFile, struct.error, EOFError, RuntimeError, ValueError, LookupError),
    OverflowError,
)


@dataclass(frozen=True, kw_only=True)
class Archive:
    """A zip archive with uncompressed entries, which are in ascending order here.

    Attributes:
        file: The archive.
        headers: Where each entry's header starts.
        sizes: Bytes of each entry.
        little_endian: Whether tensors are stored as they are in memory, on any machine of today.
    """

    file: Path
    headers: tuple[int, ...]
    sizes: tuple[int, ...]
    little_endian: bool

    def size_at(self, offset: int) -> int:
        """Bytes of the entry whose data starts at an offset."""
        return self.sizes[bisect_left(self.headers, offset) - 1]


def open_archive(file: Path) -> Archive | None:
    """The archive that a file of today's format is, or None for the old format.

    Raises:
        CheckpointError: missing, neither format, damaged, or an archive that PyTorch writes no
            state dicts as: compressed, or a TorchScript program.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(_START_BYTES)
            check_no_pointer(file, start)
            if start.startswith(b"PK\3\4"):
                return _read_directory(file, stream)
            if _OLD_MAGIC in start:
                return None
            raise _foreign(file, start + stream.read(_PICKLE_BYTES))
    except FileNotFoundError as err:
        raise CheckpointError("checkpoint file not found", seen=file) from err
    except OSError as err:
        raise CheckpointError("weight file cannot be read", seen=f"{file}: {err}") from err


def wants_to_run(file: Path, calls: str) -> CheckpointError:
    """The error for a pickle that is more than data."""
    return CheckpointError(
        "the pickle wants to run code, so it was not read",
        seen=f"{file}: calls {calls[:_MAX_NAME_SHOWN]}",
        allowed="tensors, numbers and plain containers",
        fix="get the checkpoint as safetensors, or save its state dict alone",
    )


def _read_directory(file: Path, stream: BinaryIO) -> Archive:
    size = stream.seek(0, 2)
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
            names = {entry.filename.partition("/")[2]: entry for entry in entries}
            if "constants.pkl" in names:
                raise CheckpointError(
                    "the file is a TorchScript program, which is not run",
                    seen=file,
                    allowed="a state dict: tensors by name",
                )
            for entry in entries:
                _check_entry(file, entry, size)
            order = archive.read(names["byteorder"]) if "byteorder" in names else b"little"
    except _ZIP_FAILURES as err:
        raise damaged(file, f"not a whole zip archive: {err}") from err
    return Archive(
        file=file,
        headers=tuple(entry.header_offset for entry in entries),
        sizes=tuple(entry.file_size for entry in entries),
        little_endian=order == b"little",
    )


def _check_entry(file: Path, entry: zipfile.ZipInfo, size: int) -> None:
    """Refuse what would unpack to more than the file has, before anything unpacks it."""
    name = entry.filename[:_MAX_NAME_SHOWN]
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
        raise CheckpointError(
            "the PyTorch file is compressed, as torch.save writes none",
            seen=f"{name!r} in {file}",
            fix="save the checkpoint again, with torch.save or as safetensors",
        )
    limit = size if "/data/" in entry.filename else min(size, _MAX_RECORD_BYTES)
    if entry.file_size > limit:
        raise damaged(file, f"{name!r} of {entry.file_size} bytes in a file of {size}")


def _foreign(file: Path, start: bytes) -> CheckpointError:
    """The error for a file of neither format, in the words that help most."""
    if not start:
        return damaged(file, "an empty file")
    calls = _called_by(start)
    if calls is not None:
        return wants_to_run(file, calls)
    shown = start[:_STARTS_SHOWN]
    return damaged(file, f"not a PyTorch file, it starts with {str(shown)[1:]}")


def _called_by(raw: bytes) -> str | None:
    """The first thing that a pickle looks up, which it does to call it; None where it is no pickle.

    Nothing is unpickled: the instructions are read alone.
    """
    texts: list[str] = []
    found: list[str] = []
    complete = False
    try:
        for instruction, value, _ in pickletools.genops(raw):
            if isinstance(value, str) and instruction.name in ("GLOBAL", "INST"):
                found.append(value.replace(" ", "."))
            elif isinstance(value, str):
                texts.append(value)
            elif instruction.name == "STACK_GLOBAL":
                found.append(".".join(texts[-2:]))
            complete = instruction.name == "STOP"
    except (ValueError, LookupError, struct.error, OverflowError):
        # The end of what was read, or text, whose first letters may read as instructions.
        pass
    return found[0] if found and (complete or raw.startswith(b"\x80")) else None
