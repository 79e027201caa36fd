"""Writing a bundle: in a hidden sibling folder, renamed when complete.

Interrupted at any point, even by ``kill -9``, nothing half-written is ever found under the final
name; what an abandoned draft leaves in hidden folders goes away at the next write beside it, see
:mod:`gap_export.bundle.drafts`. POSIX only.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from gap_export.bundle.drafts import (
    DRAFT_MARK,
    REPLACED_MARK,
    make_draft_folder,
    put_in_place,
    sweep_drafts,
    sync_tree,
)
from gap_export.bundle.files import HASH_NAME, hash_line, may_be_unlisted, walk_files
from gap_export.bundle.hashing import FileHasher, FileState, changed
from gap_export.bundle.holding import Held, HeldFile, Hold, hold_file
from gap_export.errors import BundleError, OutputError
from gap_export.outputs import check_outside_listings, in_real_folder
from gap_export.spec.manifest import (
    MANIFEST_NAME,
    FileSpec,
    Manifest,
    check_member_path,
    parse_manifest,
)

_WRITE_FAILURES = {
    errno.ENOSPC: "no space left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file system does not take files of that size",
    errno.EROFS: "the file system is read-only",
}


class BundleDraft:
    """A bundle being written.

    Attributes:
        folder: Where its files go until :meth:`commit`.
        hasher: Hashes files in the background; tell it early of every large one.
    """

    def __init__(self, folder: Path, final: Path, *, force: bool, hasher: FileHasher) -> None:
        self.folder = folder
        self.hasher = hasher
        self._final = final
        self._force = force
        self._held: dict[str, tuple[HeldFile, FileState]] = {}
        self._committed = False

    @property
    def committed(self) -> bool:
        """Whether the bundle stands under its final name."""
        return self._committed

    def place(self, source: Path, name: str, *, hold: Hold) -> HeldFile:
        """Bring a file into the bundle; it is hashed while the export goes on.

        A linked file *is* the source: neither may be written to.

        Args:
            source: Any file; links to it are followed.
            name: Path within the bundle.
            hold: ``link``: without taking room, where source and bundle are on one file system that
                allows it, else as a copy; ``copy``: as a file of its own, which may share blocks
                that the file system splits when written to.

        Returns:
            How it is held; :meth:`commit` adds its entry to the manifest.

        Raises:
            BundleError: the name leaves the bundle's folder.
            CheckpointError: the source cannot be read.
            OutputError: the source is being written to; the disk is full or cannot be written.
        """
        target = self.folder / check_member_path(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        held = hold_file(source, target, hold=hold, hasher=self.hasher)
        self._held[name] = held, FileState.of(os.lstat(target))
        return held

    def commit(self, manifest: Manifest) -> Manifest:
        """Complete the bundle: list and hash all its files, then give it its final name.

        Args:
            manifest: ``files`` is filled in here.

        Returns:
            The manifest as written.

        Raises:
            CheckpointError: a file that was placed cannot be read any more.
            OutputError: a file that was placed has changed since, the final name was taken
                meanwhile, or the disk is full.
        """
        complete = dataclasses.replace(manifest, files=self._list_files())
        raw = complete.to_json()
        (self.folder / MANIFEST_NAME).write_bytes(raw)
        (self.folder / HASH_NAME).write_bytes(hash_line(raw))
        linked = {spec.path for spec in complete.files if spec.held == "linked"}
        sync_tree(self.folder, leave_out={self.folder / path for path in linked})
        _check_final(self._final, force=self._force)
        put_in_place(self.folder, self._final)
        self._committed = True
        return complete

    def _list_files(self) -> tuple[FileSpec, ...]:
        found = [(path, FileState.of(status)) for path, status in walk_files(self.folder)]
        sources: dict[str, tuple[Path, Literal["written"] | Held]] = {}
        for path, state in found:
            held, as_placed = self._held.get(path, (None, None))
            if held is not None and state == as_placed:
                sources[path] = held.source, held.held
                if self.hasher.hashed(held.source).state != held.state:
                    raise changed(held.source)
            else:
                sources[path] = self.folder / path, "written"
                self.hasher.start(self.folder / path)
        # Waits for what is still being hashed.
        self.hasher.check_unchanged()
        return tuple(
            FileSpec(
                path=path,
                size=state.size,
                sha256=self.hasher.sha256(sources[path][0]),
                held=sources[path][1],
            )
            for path, state in found
        )


@contextmanager
def write_bundle(out: str | Path, *, force: bool = False) -> Iterator[BundleDraft]:
    """Write a bundle; without :meth:`BundleDraft.commit` nothing remains.

    Args:
        out: The bundle's folder. It may be missing or empty.
        force: Replace a bundle that is there. Any other folder is refused in any case.

    Raises:
        OutputError: the folder is taken, the disk is full, or the place cannot be written.
    """
    final = in_real_folder(Path(out))
    created: list[Path] = []
    draft: BundleDraft | None = None
    lock = -1
    try:
        with _as_output_error(final):
            _check_final(final, force=force)
            created = _make_parents(final.parent)
            sweep_drafts(final)
            folder, lock = make_draft_folder(final)
            with FileHasher() as hasher:
                draft = BundleDraft(folder, final, force=force, hasher=hasher)
                yield draft
    finally:
        if draft is None or not draft.committed:
            if draft is not None:
                shutil.rmtree(draft.folder, ignore_errors=True)
            for parent in reversed(created):
                # Another process may have put something there meanwhile; then it stays.
                with suppress(OSError):
                    parent.rmdir()
        if lock >= 0:
            os.close(lock)


@contextmanager
def _as_output_error(final: Path) -> Iterator[None]:
    """Turn failures of writing into one clear message; a missing source, for one, passes."""
    try:
        yield
    except OSError as err:
        ours = err.filename is not None and _is_ours(Path(str(err.filename)), final)
        denied = err.errno in (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)
        reason = _WRITE_FAILURES.get(err.errno or 0)
        if reason is None and not (ours and denied):
            raise
        raise OutputError(
            "the bundle cannot be written",
            seen=f"{final}: {reason or err.strerror}",
            fix="make room or choose another place with --out; nothing half-written was left",
        ) from err


def check_output(out: str | Path, *, force: bool) -> None:
    """Refuse a place for a bundle beforehand, as :func:`write_bundle` would.

    Raises:
        OutputError: the folder is taken.
    """
    _check_final(in_real_folder(Path(out)), force=force)


def _is_ours(path: Path, final: Path) -> bool:
    """Whether a path is the bundle's, a draft's or a folder around them; not a file beside them."""
    absolute = in_real_folder(path)
    # Creating missing parents may fail at any of them.
    if final.is_relative_to(absolute):
        return True
    if not absolute.is_relative_to(final.parent):
        return False
    name = absolute.relative_to(final.parent).parts[0]
    marks = (DRAFT_MARK, REPLACED_MARK)
    return name == final.name or name.startswith(tuple(f".{final.name}{mark}" for mark in marks))


def _check_final(final: Path, *, force: bool) -> None:
    """Refuse a place that holds anything but nothing, or with ``force`` a bundle of ours."""
    check_outside_listings("the bundle", final, inside=final.parent)
    if not os.path.lexists(final):
        return
    if final.is_symlink() or not final.is_dir():
        raise OutputError(
            "the output is in the way: not a folder",
            seen=final,
            fix="choose another --out, or move it away",
        )
    if final.is_mount():
        raise OutputError(
            "the output folder is a mount point, which no finished folder can take the place of",
            seen=final,
            allowed="a new or an empty folder",
            fix=f"name a folder within it, e.g. --out {final / 'bundle'}",
        )
    if not any(final.iterdir()):
        return
    foreign = _what_is_foreign(final)
    if foreign is not None:
        raise OutputError(
            "the output folder exists and is not only a gap-export bundle",
            seen=f"{final} ({foreign})",
            allowed="a new or an empty folder",
            fix="choose another --out; --force replaces bundles only",
        )
    if not force:
        raise OutputError(
            "the output folder holds a bundle already",
            seen=final,
            allowed="a new or an empty folder",
            fix="choose another --out, or replace the bundle with --force",
        )


def _what_is_foreign(folder: Path) -> str | None:
    """Why a folder must not be removed, or None where all of it belongs to a bundle of ours."""
    try:
        manifest = parse_manifest((folder / MANIFEST_NAME).read_bytes())
        listed = {file.path for file in manifest.files} | {MANIFEST_NAME, HASH_NAME}
        for path, _ in walk_files(folder):
            if path not in listed and not may_be_unlisted(path):
                return f"it holds {path}, which the bundle does not list"
    except FileNotFoundError:
        return f"no {MANIFEST_NAME}"
    except (BundleError, OSError) as err:
        return str(err)
    return None


def _make_parents(parent: Path) -> list[Path]:
    """Create missing parents; return those created, outermost first."""
    missing: list[Path] = []
    while not os.path.lexists(parent):
        missing.append(parent)
        parent = parent.parent
    missing.reverse()
    for path in missing:
        path.mkdir(exist_ok=True)
    return missing
