"""A memory of bundles whose bytes were already hashed, in the user's cache.

Hashing gigabytes at every start would be slow. A stamp says: this file, at this device and inode,
with this size, mtime and ctime, had the right hash. The kernel sets ctime at every change and no
ordinary call sets it back, so restoring a changed file's mtime does not fool it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from gap_export.bundle.files import sha256_of
from gap_export.errors import BundleError

Verify = Literal["stamp", "full"]

logger = logging.getLogger(__name__)

# A file changed twice within one tick of the file system's clock shows the same ctime twice, so
# fresh files are not stamped; two seconds is the coarsest clock in use (FAT).
SETTLE_NS = 2_000_000_000


def verify_hashes(
    folder: Path,
    hashes: Mapping[str, str],
    statuses: Mapping[str, os.stat_result],
    *,
    verify: Verify,
    owner_sha256: str,
    refusal: Callable[[str, str], BundleError],
) -> None:
    """See that files are what they were, and remember those that are.

    Args:
        folder: What the files' paths are relative to; its stamps are kept together.
        hashes: SHA-256 of each file, in hex, by path.
        statuses: Status of the same files, taken before this call.
        verify: ``full`` hashes every file; ``stamp`` trusts those with a stamp of their status.
        owner_sha256: Hash of the file that lists the hashes; stamps of another one are not used.
        refusal: The error to raise, from a path and the SHA-256 seen there.

    Raises:
        BundleError: a file is not what it was.
        OSError: a file cannot be read.
    """
    known = {} if verify == "full" else read_stamps(folder, manifest_sha256=owner_sha256)
    stamps: dict[str, list[int]] = {}
    for path, wanted in hashes.items():
        status = statuses[path]
        stamp = file_stamp(status)
        if known.get(path) != stamp:
            seen = sha256_of(folder / path)
            if seen != wanted:
                raise refusal(path, seen)
            # A file that changed while it was read is not remembered as good.
            if file_stamp(os.lstat(folder / path)) != stamp or not is_settled(status):
                continue
        stamps[path] = stamp
    if stamps != known:
        write_stamps(folder, stamps, manifest_sha256=owner_sha256)


def file_stamp(status: os.stat_result) -> list[int]:
    """What identifies one state of one file."""
    return [
        status.st_dev,
        status.st_ino,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    ]


def is_settled(status: os.stat_result) -> bool:
    """Whether a later change of the file is sure to show in its ctime."""
    return max(status.st_ctime_ns, status.st_mtime_ns) + SETTLE_NS < time.time_ns()


def read_stamps(bundle: Path, *, manifest_sha256: str) -> Mapping[str, list[int]]:
    """Stamps of a bundle's files by path; empty where there are none for this manifest."""
    stamp_file = _stamp_file(bundle)
    if stamp_file is None:
        return {}
    try:
        plain = json.loads(stamp_file.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as err:
        logger.debug("stamp %s not usable: %s", stamp_file, err)
        return {}
    if not isinstance(plain, dict) or plain.get("manifest_sha256") != manifest_sha256:
        return {}
    files = plain.get("files")
    return files if isinstance(files, dict) else {}


def write_stamps(bundle: Path, stamps: Mapping[str, list[int]], *, manifest_sha256: str) -> None:
    """Remember stamps. A cache that cannot be written costs time only, so it is no error."""
    stamp_file = _stamp_file(bundle)
    if stamp_file is None:
        return
    plain = {"bundle": str(bundle), "manifest_sha256": manifest_sha256, "files": dict(stamps)}
    part = stamp_file.with_name(f"{stamp_file.name}.{os.getpid()}.part")
    try:
        stamp_file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(plain), encoding="utf-8")
        part.replace(stamp_file)
    except OSError as err:
        logger.debug("stamp %s not written: %s", stamp_file, err)
        with suppress(OSError):
            part.unlink()


def cache_folder() -> Path | None:
    """Where the package keeps what it can do without; None where the user has no home."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        # The specification of XDG base directories has relative values ignored.
        base = root if root.is_absolute() else Path.home() / ".cache"
    except RuntimeError as err:
        logger.debug("no cache folder: %s", err)
        return None
    return base / "gap-export"


def _stamp_file(bundle: Path) -> Path | None:
    folder = cache_folder()
    key = hashlib.sha256(os.fsencode(bundle)).hexdigest()
    return None if folder is None else folder / "stamps" / f"{key}.json"
