"""Bringing a file from elsewhere into a bundle: shared where it can be, copied where not."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from gap_export.bundle.files import reserve_space
from gap_export.bundle.hashing import (
    FileHasher,
    FileState,
    HashedFile,
    changed,
    hash_stream,
    unreadable,
)
from gap_export.errors import CheckpointError

logger = logging.getLogger(__name__)

Hold = Literal["link", "copy"]
Held = Literal["copied", "cloned", "linked"]

# linux/fs.h; the same on every architecture that Python's wheels are built for.
_FICLONE = 0x40049409
_COPY_BYTES = 4 << 20
# How file systems say that they cannot share bytes between these two files: no such operation,
# another device, a source of another user's (fs.protected_hardlinks), too many links.
_CANNOT_SHARE = frozenset({
    errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOTTY, errno.ENOSYS, errno.EINVAL, errno.EXDEV,
    errno.EPERM, errno.EACCES, errno.EMLINK, errno.ETXTBSY,
})  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class HeldFile:
    """A file in a bundle that came from elsewhere.

    Attributes:
        source: Where from, links resolved.
        state: The state of the source when it was taken.
        size: In bytes.
        held: ``cloned``: shares its blocks until either is written to; ``linked``: is the source,
            under another name; ``copied``.
    """

    source: Path
    state: FileState
    size: int
    held: Held


def hold_file(source: Path, target: Path, *, hold: Hold, hasher: FileHasher) -> HeldFile:
    """Bring a file to a new place, and see that it gets hashed, now or in the background.

    Cloning comes first for both ways: a clone costs no room and is as good as a copy to every
    reader, while some tools refuse files with more than one hard link.

    Args:
        source: Any file; links to it are followed.
        target: A new name in an existing folder.
        hold: ``link``: clone, else hard link, else copy; ``copy``: clone, else copy.
        hasher: Hashes the source.

    Raises:
        CheckpointError: the source cannot be read.
        OutputError: the source is being written to.
        OSError: the target cannot be written.
    """
    real = source.resolve()
    with _open_source(real) as reader:
        state = FileState.of(os.fstat(reader.fileno()))
        held: Held = "copied"
        if _clone(reader, target):
            held = "cloned"
        elif hold == "link" and _link(real, target):
            held = "linked"
        else:
            _copy(reader, real, target, state, hasher)
    if held == "linked" and FileState.of(os.lstat(target)) != state:
        raise changed(real)
    hasher.start(real)
    return HeldFile(source=real, state=state, size=state.size, held=held)


def _link(real: Path, target: Path) -> bool:
    """Make the target a hard link; False where the bytes must be copied."""
    try:
        os.link(real, target)
    except OSError as err:
        if err.errno not in _CANNOT_SHARE:
            raise
        logger.info("%s is copied, it cannot be linked: %s", real, err.strerror)
        return False
    return True


def _clone(reader: BinaryIO, target: Path) -> bool:
    """Make the target a clone, which btrfs, XFS and bcachefs can; True where it is one."""
    # Not at the top: reading bundles needs no clones, and works where fcntl does not exist.
    import fcntl

    with target.open("xb") as writer:
        try:
            fcntl.ioctl(writer, _FICLONE, reader.fileno())
        except OSError as err:
            if err.errno not in _CANNOT_SHARE:
                raise
        else:
            return True
    target.unlink()
    return False


def _copy(reader: BinaryIO, real: Path, target: Path, state: FileState, hasher: FileHasher) -> None:
    """Copy, and hash on the way unless the hash is there already."""

    def read(size: int) -> bytes:
        # What fails here must not be blamed on the place that is written to.
        try:
            return reader.read(size)
        except OSError as err:
            raise unreadable(real, err) from err

    with target.open("xb") as writer:
        reserve_space(writer, state.size)
        if hasher.has(real):
            while chunk := read(_COPY_BYTES):
                writer.write(chunk)
            sha256 = None
        else:
            sha256 = hash_stream(read, writer.write)
        size = writer.tell()
    if size != state.size or FileState.of(os.fstat(reader.fileno())) != state:
        raise changed(real)
    if sha256 is not None:
        hasher.tell(real, HashedFile(sha256=sha256, state=state))


def _open_source(real: Path) -> BinaryIO:
    try:
        # Opening a pipe would block.
        if real.exists() and not real.is_file():
            raise CheckpointError("not a plain file", seen=real)
        return real.open("rb", buffering=0)
    except OSError as err:
        raise unreadable(real, err) from err
