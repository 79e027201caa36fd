"""What a bundle folder holds: names with a meaning, a safe walk, and hashing."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from gap_export.errors import BundleError
from gap_export.outputs import BUNDLE_MARK
from gap_export.spec.manifest import MANIFEST_NAME

HASH_NAME = BUNDLE_MARK
ENGINES_FOLDER = "engines"
CALIBRATION_NAME = "calibration.json"
# A name of its own while it is written: a killed writer leaves a bundle that can be opened.
CALIBRATION_PART = f"{CALIBRATION_NAME}.part"

_CHUNK_BYTES = 1 << 20
# Bundles have two levels; each costs a call within a call here and wherever a folder is removed.
_MAX_DEPTH, _MAX_SHOWN = 32, 80


def may_be_unlisted(path: str) -> bool:
    """Whether a file of a bundle may be there without being listed in its manifest."""
    return path in (CALIBRATION_NAME, CALIBRATION_PART) or path.startswith(f"{ENGINES_FOLDER}/")


def hash_line(raw: bytes, *, name: str = MANIFEST_NAME) -> bytes:
    """Content of ``gap.json.sha256`` for a manifest's bytes, as ``sha256sum -c`` reads it."""
    return f"{hashlib.sha256(raw).hexdigest()}  {name}\n".encode()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as source:
        while chunk := source.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def reserve_space(stream: BinaryIO, size: int) -> None:
    """Have a new file's room set aside, so that a disk too small says so before hours of work.

    Args:
        stream: The file, open for writing.
        size: Bytes it will have.

    Raises:
        OSError: no space left on the disk.
    """
    if size and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(stream.fileno(), 0, size)
        except OSError as err:
            # Some file systems cannot; then writing itself will tell.
            if err.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENODEV):
                raise


def walk_files(folder: Path, *, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Every file below a folder, by name, as (POSIX path within the folder, lstat).

    Args:
        folder: The folder.
        prefix: Put before each path, for folders within folders.

    Raises:
        BundleError: something is neither a plain file nor a folder. A symbolic link could lead out
            of the bundle, and a pipe or device would block the reader. Or folders are nested
            deeper than any bundle's.
        OSError: a folder cannot be read.
    """
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        name = f"{prefix}{entry.name}"
        status = entry.stat(follow_symlinks=False)
        if stat.S_ISDIR(status.st_mode) and name.count("/") >= _MAX_DEPTH:
            raise BundleError(
                "the bundle holds folders within folders without end",
                seen=f"{name[:_MAX_SHOWN]}...",
                allowed=f"{_MAX_DEPTH} levels",
                fix="remove them, or export the bundle again",
            )
        if stat.S_ISDIR(status.st_mode):
            yield from walk_files(folder / entry.name, prefix=f"{name}/")
        elif stat.S_ISREG(status.st_mode):
            # scandir's cached stat may lack device and inode on some systems; ask again.
            yield name, os.lstat(folder / entry.name)
        else:
            kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else "not a plain file"
            raise BundleError(
                f"the bundle holds something that is {kind}",
                seen=name,
                allowed="plain files and folders",
                fix="copy the bundle again with links followed (cp -rL), or export it again",
            )
