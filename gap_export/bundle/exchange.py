"""Two folders change names in one step, so that at no moment either name leads nowhere."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

# linux/fcntl.h and linux/fs.h; the same on every architecture.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# How kernels, file systems and sandboxes say that they cannot: no such call, no such flag, not
# permitted, or, of layered file systems, not between these two.
_CANNOT = frozenset({
    errno.ENOSYS, errno.EINVAL, errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EXDEV,
})  # fmt: skip


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
