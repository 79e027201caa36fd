"""Opening a bundle: nothing of it is used before all of it was checked."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gap_export.bundle.drafts import find_standing
from gap_export.bundle.files import (
    CALIBRATION_NAME,
    ENGINES_FOLDER,
    HASH_NAME,
    hash_line,
    may_be_unlisted,
    walk_files,
)
from gap_export.bundle.stamps import Verify, verify_hashes
from gap_export.errors import BundleError
from gap_export.spec.manifest import MANIFEST_NAME, FileSpec, Manifest, parse_manifest

_GET_IT_AGAIN = "export it again, or copy it again from where it was made"
# Far above any real manifest; keeps a hostile one from filling the memory.
_MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle whose files were found to be what its manifest says.

    Attributes:
        path: The bundle's folder, absolute, links resolved.
        manifest: What is in it.
    """

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Where a file of the manifest lies."""
        return self.path / name


def open_bundle(path: str | Path, *, verify: Verify = "stamp") -> Bundle:
    """Check a bundle and read its manifest.

    Where a writer was killed while it replaced the bundle, the old one is opened, see
    :func:`gap_export.bundle.drafts.find_standing`.

    Hard links are accepted: a bundle may hold its weights that way, and the hash speaks for the
    bytes however they are held.

    Args:
        path: The bundle's folder.
        verify: ``full`` hashes every byte; ``stamp`` trusts files that were hashed before and have
            not changed since, going by device, inode, size, mtime and ctime.

    Raises:
        BundleError: not a bundle, damaged, incomplete, with files that are not listed, with links,
            of a newer version, or with a path that leaves its folder.
    """
    folder = find_standing(Path(path).resolve())
    try:
        raw = _read_manifest_bytes(folder)
        manifest = parse_manifest(raw)
        _check_listing(manifest)
        present = dict(walk_files(folder))
        _check_presence(manifest, present)
        verify_hashes(
            folder,
            {file.path: file.sha256 for file in manifest.files},
            present,
            verify=verify,
            owner_sha256=hashlib.sha256(raw).hexdigest(),
            refusal=lambda path, seen: _not_as_made(folder, manifest, path, seen),
        )
    except OSError as err:
        raise BundleError("the bundle cannot be read", seen=err, fix=_GET_IT_AGAIN) from err
    return Bundle(path=folder, manifest=manifest)


def _read_manifest_bytes(folder: Path) -> bytes:
    if not folder.is_dir():
        raise BundleError(
            "no bundle there" if not folder.exists() else "a bundle is a folder, this is a file",
            seen=folder,
            fix="make one: gap-export MODEL --out DIR",
        )
    for name in (MANIFEST_NAME, HASH_NAME):
        if not os.path.lexists(folder / name):
            raise BundleError(
                f"not a bundle, or a damaged one: {name} is missing",
                seen=folder,
                fix=f"name a folder made by gap-export, or {_GET_IT_AGAIN}",
            )
        status = os.lstat(folder / name)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_MANIFEST_BYTES:
            raise BundleError(
                f"{name} is not a plain file of sensible size",
                seen=f"{folder / name}, {status.st_size} bytes",
                allowed=f"a plain file of at most {_MAX_MANIFEST_BYTES} bytes, no link",
                fix=_GET_IT_AGAIN,
            )
    raw = (folder / MANIFEST_NAME).read_bytes()
    if (folder / HASH_NAME).read_bytes() != hash_line(raw):
        raise BundleError(
            f"{MANIFEST_NAME} does not match {HASH_NAME}", seen=folder, fix=_GET_IT_AGAIN
        )
    return raw


def _check_listing(manifest: Manifest) -> None:
    """The manifest agrees with itself: each path once, and all that it uses is listed."""
    listed: set[str] = set()
    for file in manifest.files:
        if file.path in listed or file.path in (MANIFEST_NAME, HASH_NAME):
            raise BundleError(
                f"{MANIFEST_NAME} must not list this path, or not twice",
                seen=file.path,
                fix=_GET_IT_AGAIN,
            )
        listed.add(file.path)
    for path in manifest.used_files():
        if path not in listed:
            raise BundleError(
                f"{MANIFEST_NAME} uses a file that it does not list", seen=path, fix=_GET_IT_AGAIN
            )


def _check_presence(manifest: Manifest, present: Mapping[str, os.stat_result]) -> None:
    listed = {file.path for file in manifest.files}
    missing = sorted(listed - set(present))
    if missing:
        raise BundleError(
            "the bundle is not complete, missing", seen=", ".join(missing), fix=_GET_IT_AGAIN
        )
    unlisted = [
        path
        for path in present
        if path not in listed
        and path not in (MANIFEST_NAME, HASH_NAME)
        and not may_be_unlisted(path)
    ]
    if unlisted:
        raise BundleError(
            "the bundle holds files its manifest does not list",
            seen=", ".join(unlisted[:5]) + (", ..." if len(unlisted) > 5 else ""),
            allowed=f"the files of {MANIFEST_NAME}, {CALIBRATION_NAME}, and all that is below "
            f"{ENGINES_FOLDER}/",
            fix="move them out of the bundle",
        )
    for file in manifest.files:
        if present[file.path].st_size != file.size:
            raise BundleError(
                f"{file.path} has the wrong size",
                seen=f"{present[file.path].st_size} bytes",
                allowed=f"{file.size} bytes",
                fix=_how_to_mend(file, present[file.path]),
            )


def _not_as_made(folder: Path, manifest: Manifest, path: str, seen: str) -> BundleError:
    (file,) = (file for file in manifest.files if file.path == path)
    return BundleError(
        f"{path} is not what it was when the bundle was made",
        seen=f"SHA-256 {seen}",
        allowed=file.sha256,
        fix=_how_to_mend(file, os.lstat(folder / path)),
    )


def _how_to_mend(file: FileSpec, status: os.stat_result) -> str:
    # One link alone means a copy of the bundle, whose bytes are its own.
    if file.held == "linked" and status.st_nlink > 1:
        return (
            "this file is the checkpoint's own, by a hard link, and was changed there: export "
            "again; --copy-weights makes a bundle of its own"
        )
    return _GET_IT_AGAIN
