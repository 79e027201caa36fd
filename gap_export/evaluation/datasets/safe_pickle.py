"""Pickles of unknown origin: plain values are read, everything else is refused.

A pickle is a program that may call what ``find_class`` gives it. Here that is nothing, so no code
can run. It can still ask for much memory; a limit on its size is all there is
against that.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path

from gap_export.errors import UsageError
from gap_export.evaluation.datasets.rows import read_bytes

# refs(unc).p of RefCOCO is 14 MB.
MAX_PICKLE_BYTES = 256 << 20
# What a damaged pickle makes the reader raise.
_DAMAGED = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class _NotPlainError(Exception):
    """A pickle asked for something that is not plain."""


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> object:
        raise _NotPlainError(f"it asks for {module}.{name}"[:200])

    def persistent_load(self, pid: object) -> object:
        raise _NotPlainError(f"it refers to something outside, {pid!r}"[:200])


def read_plain_pickle(file: Path) -> object:
    """What a pickle of plain values holds; no code of it is run.

    Text of Python 2 is read as UTF-8, what is none as U+FFFD.

    Args:
        file: Any protocol.

    Returns:
        Lists, tuples, dictionaries, sets, text, bytes, numbers, bool and None.

    Raises:
        UsageError: it holds anything else, is damaged, too large, or cannot be read.
    """
    raw = read_bytes(file, max_bytes=MAX_PICKLE_BYTES)
    reader = _PlainUnpickler(io.BytesIO(raw), encoding="utf-8", errors="replace")
    try:
        plain: object = reader.load()
    except _NotPlainError as err:
        raise UsageError(
            "refused: loading this pickle would execute code",
            seen=f"{file}: {err}",
            allowed="lists, dictionaries, text and numbers",
            fix="get the file again from where you trust it",
        ) from err
    except _DAMAGED as err:
        raise UsageError(
            "not a pickle that can be read", seen=f"{file}: {str(err) or type(err).__name__}"
        ) from err
    return plain
