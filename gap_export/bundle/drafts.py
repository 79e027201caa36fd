"""A folder that appears under its name when complete, or not at all.

It is made as a hidden sibling folder that is renamed at the end. Its maker holds a lock on it,
which the kernel releases when the process dies, so a living draft is never swept. POSIX only.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import secrets
import shutil
from collections.abc import Container
from contextlib import suppress
from pathlib import Path

from gap_export.errors import OutputError

logger = logging.getLogger(__name__)

DRAFT_MARK = ".gap-draft-"
REPLACED_MARK = ".gap-replaced-"
# linux/fcntl.h and linux/fs.h; the same on every architecture.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# How kernels, file systems and sandboxes say that they cannot: no such call, no such flag, not
# permitted, or, of layered file systems, not between these two.
_CANNOT = frozenset({
    errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EXDEV,
})  # fmt: skip


def make_draft_folder(final: Path) -> tuple[Path, int]:
    """A fresh hidden sibling folder, and the descriptor that holds its lock.

    Args:
        final: The name it is to have at the end; its parent exists.

    Raises:
        OutputError: no folder can be made there.
        OSError: the parent cannot be written.
    """
    while True:
        folder = final.parent / f".{final.name}{DRAFT_MARK}{secrets.token_hex(4)}"
        try:
            folder.mkdir()
        except FileNotFoundError as err:
            # Not a missing parent, those are made before: a place such as /proc takes no folders.
            raise OutputError(
                "no folder can be made there",
                seen=final,
                fix="choose another place",
            ) from err
        lock = try_lock(folder)
        # Another process may sweep between mkdir and lock; then take a new name.
        if lock is not None and folder.is_dir():
            return folder, lock
        if lock is not None:
            os.close(lock)


def sweep_drafts(final: Path) -> None:
    """Remove what dead writers of this name left, and put back a folder they had set aside."""
    prefix = f".{final.name}"
    for folder in sorted(final.parent.iterdir()):
        is_draft = folder.name.startswith(prefix + DRAFT_MARK)
        is_replaced = folder.name.startswith(prefix + REPLACED_MARK)
        if not (is_draft or is_replaced) or folder.is_symlink() or not folder.is_dir():
            continue
        lock = try_lock(folder)
        if lock is None:
            continue
        try:
            if is_replaced and not os.path.lexists(final):
                # The writer died between its two renames; the old folder is still whole.
                folder.rename(final)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(lock)


def put_in_place(folder: Path, final: Path) -> None:
    """Give the draft its final name; a folder in the way is removed after that, or put back.

    A folder in the way changes names with the draft in one step: killed at any point, there is a
    whole folder under the name. Where the file system has no such step, the old one is set aside
    first, and :func:`find_standing` finds it there until the next writer puts it back.

    Raises:
        OutputError: another process took the name meanwhile.
        OSError: the parent cannot be written.
    """
    taken = final.is_dir() and any(final.iterdir())
    lock = try_lock(final) if taken else None
    try:
        old = _exchange(folder, final) if taken else None
        if old is None:
            old = _rename_in_two_steps(folder, final, taken=taken)
    finally:
        if lock is not None:
            os.close(lock)
    sync(final.parent)
    if taken:
        shutil.rmtree(old, ignore_errors=True)


def find_standing(final: Path) -> Path:
    """The folder of that name, or where it is missing the one that a killed writer had set aside.

    Returns:
        ``final`` where nothing, or more than one folder, was set aside.
    """
    prefix = f".{final.name}{REPLACED_MARK}"
    if os.path.lexists(final):
        return final
    with suppress(OSError):
        aside = [p for p in final.parent.iterdir() if p.name.startswith(prefix)]
        if len(aside) == 1 and aside[0].is_dir() and not aside[0].is_symlink():
            logger.warning(
                "%s is missing: the process that replaced it was killed; the old one is read, %s. "
                "Give it its name back, or write %s again",
                final, aside[0], final.name,
            )  # fmt: skip
            return aside[0]
    return final


def _exchange(folder: Path, final: Path) -> Path | None:
    """Change the two names in one step; where the old folder then is, None where that cannot be."""
    before = final.stat()
    draft = folder.stat()
    try:
        if not exchange(folder, final):
            return None
    except BaseException:
        # Ctrl+C or a signal, which may come right after it.
        if os.path.samestat(final.stat(), draft):
            exchange(folder, final)
        raise
    if not os.path.samestat(folder.stat(), before):
        exchange(folder, final)
        raise _taken(final)
    return folder


def _rename_in_two_steps(folder: Path, final: Path, *, taken: bool) -> Path:
    """Set the old folder aside, if there is one, and give the draft its name; where the old is."""
    replaced = final.parent / f".{final.name}{REPLACED_MARK}{secrets.token_hex(4)}"
    try:
        if taken:
            final.rename(replaced)
        folder.rename(final)
    except OSError as err:
        _put_back(folder, final, replaced)
        if err.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise _taken(final) from err
        raise
    except BaseException:
        # Ctrl+C or a signal, which may come right after either rename.
        _put_back(folder, final, replaced)
        raise
    return replaced


def _taken(final: Path) -> OutputError:
    return OutputError(
        "the output folder was taken by another process meanwhile",
        seen=final,
        fix="try again, or choose another place",
    )


def sync_tree(folder: Path, *, leave_out: Container[Path]) -> None:
    """Have everything on the disk; linked files, which we did not write, are not ours to flush."""
    for parent, _, files in os.walk(folder):
        for path in (Path(parent, name) for name in files):
            if path not in leave_out:
                sync(path)
        sync(Path(parent))


def sync(path: Path) -> None:
    """Have one file, or one folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def try_lock(folder: Path, *, shared: bool = False) -> int | None:
    """The descriptor that holds a lock on a folder; None where there is no folder, or no lock."""
    # Not at the top: reading bundles needs no locks, and works where fcntl does not exist.
    import fcntl

    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _put_back(folder: Path, final: Path, replaced: Path) -> None:
    """Undo what was done of the two renames: folders alone tell, a variable may lag behind."""
    if not folder.exists() and final.is_dir():
        final.rename(folder)
    if replaced.exists():
        # Another process may have taken the name; the old one then stays, hidden but whole.
        with suppress(OSError):
            replaced.rename(final)


def exchange(one: Path, other: Path) -> bool:
    """Give each of two folders the name of the other, atomically.

    Returns:
        False where system or file system have no such call; then nothing was done.

    Raises:
        OSError: it failed for another reason; then nothing was done either.
    """
    # Since glibc 2.28 (2018); other systems have calls of their own, if any.
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    names = (os.fsencode(one.absolute()), os.fsencode(other.absolute()))
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))
