"""Hashing large files in the background, each once, while an export does something else."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from gap_export.errors import CheckpointError, OutputError

# hashlib lets go of the interpreter for pieces as large as this; more threads than two would only
# take turns at the disk.
_CHUNK_BYTES = 4 << 20
_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class FileState:
    """What shows that a file is still the one that was read.

    Not its ctime: a hard link to the file sets that as well.
    """

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> FileState:
        """The state that a stat call saw."""
        return cls(
            device=status.st_dev,
            inode=status.st_ino,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
        )


@dataclass(frozen=True, kw_only=True)
class HashedFile:
    """A file's hash, and the state it was read in."""

    sha256: str
    state: FileState


class FileHasher:
    """SHA-256 of files, at most two at a time in threads of its own.

    A context manager: leaving it ends the threads within a fraction of a second. Paths are
    resolved, so a file is hashed once, however many links lead to it.
    """

    def __init__(self) -> None:
        self._stop = Event()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="hash")
        self._files: dict[Path, Future[HashedFile]] = {}

    def __enter__(self) -> FileHasher:
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._threads.shutdown(wait=True, cancel_futures=True)

    def start(self, path: Path) -> None:
        """Have a file hashed soon; does not wait. Asking again costs nothing."""
        real = path.resolve()
        if real not in self._files:
            self._files[real] = self._threads.submit(_hash_file, real, self._stop)

    def has(self, path: Path) -> bool:
        """Whether the file is hashed already, or about to be."""
        return path.resolve() in self._files

    def tell(self, path: Path, hashed: HashedFile) -> None:
        """Take over the hash of a file that was just read elsewhere."""
        done: Future[HashedFile] = Future()
        done.set_result(hashed)
        self._files[path.resolve()] = done

    def hashed(self, path: Path) -> HashedFile:
        """A file's hash and the state it was read in; waits for it.

        Raises:
            CheckpointError: the file cannot be read.
            OutputError: it was changed while it was read.
        """
        self.start(path)
        return self._files[path.resolve()].result()

    def sha256(self, path: Path) -> str:
        """SHA-256 of a file in hex; waits for it.

        Raises:
            CheckpointError: the file cannot be read.
            OutputError: it was changed while it was read.
        """
        return self.hashed(path).sha256

    def check_unchanged(self) -> None:
        """See that every file that was asked for still is the one that was hashed.

        Raises:
            CheckpointError: one cannot be read.
            OutputError: one was changed, or another took its place.
        """
        for path, future in self._files.items():
            try:
                now = FileState.of(path.stat())
            except OSError as err:
                raise unreadable(path, err) from err
            if future.result().state != now:
                raise changed(path)


def hash_stream(
    read: Callable[[int], bytes], use: Callable[[bytes], object], *, stop: Event | None = None
) -> str:
    """SHA-256 of all that a stream gives.

    Args:
        read: Gives at most so many bytes, none at the end.
        use: Is given every piece.
        stop: Set once the result is not wanted any more.

    Raises:
        InterruptedError: it was stopped.
    """
    digest = hashlib.sha256()
    while chunk := read(_CHUNK_BYTES):
        if stop is not None and stop.is_set():
            raise InterruptedError
        digest.update(chunk)
        use(chunk)
    return digest.hexdigest()


def unreadable(path: Path, err: OSError) -> CheckpointError:
    """The error for a file that is missing or may not be read."""
    return CheckpointError("file cannot be read", seen=f"{path}: {err.strerror}")


def changed(path: Path) -> OutputError:
    """The error for a file that is not any more what it was."""
    return OutputError(
        "the checkpoint changed while it was exported",
        seen=path,
        fix="export again when it is not being written to",
    )


def _hash_file(path: Path, stop: Event) -> HashedFile:
    try:
        with path.open("rb", buffering=0) as stream:
            before = FileState.of(os.fstat(stream.fileno()))
            sha256 = hash_stream(stream.read, len, stop=stop)
            after = FileState.of(os.fstat(stream.fileno()))
    except InterruptedError:
        raise
    except OSError as err:
        raise unreadable(path, err) from err
    if before != after:
        raise changed(path)
    return HashedFile(sha256=sha256, state=after)
