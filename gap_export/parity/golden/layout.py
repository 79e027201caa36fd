"""Where a golden's arrays lie, as its safetensors file itself says; with the standard library."""

from __future__ import annotations

import json
import struct
from pathlib import Path

from gap_export.parity.golden.format import SAFETENSORS_DTYPES, StoredTensor

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"


def read_layout(file: Path) -> dict[str, StoredTensor]:
    """Arrays by name; none where the header cannot be read.

    Args:
        file: Of the golden, of the size and hash that it has to have.

    Raises:
        OSError: it cannot be read.
    """
    names = {stored: name for name, stored in SAFETENSORS_DTYPES.items()}
    with file.open("rb") as stream:
        prefix = stream.read(_LENGTH.size)
        length = _LENGTH.unpack(prefix)[0] if len(prefix) == _LENGTH.size else 0
        if length > file.stat().st_size:
            return {}
        raw = stream.read(length)
    start = _LENGTH.size + length
    try:
        plain = json.loads(raw)
        return {
            name: StoredTensor(
                dtype=names[entry["dtype"]],
                shape=tuple(entry["shape"]),
                offset=start + entry["data_offsets"][0],
            )
            for name, entry in plain.items()
            if name != _METADATA
        }
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
