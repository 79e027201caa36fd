"""Names that hold the number of the layer they belong to."""

from __future__ import annotations

import re

import onnx_ir as ir

from gap_export.errors import ExportError

# A KV cache's inputs and outputs are called so, then the layer, then ``key`` or ``value``.
CACHES = ("past_key_values", "present")


class Labels:
    """Reads and changes the number in names like ``layers.1.fc1.weight`` or ``present.1.key``.

    Args:
        *prefixes: What such names begin with, without the dot.
    """

    def __init__(self, *prefixes: str) -> None:
        self._pattern = re.compile(rf"\b({'|'.join(map(re.escape, prefixes))})\.(\d+)\b")

    def split(self, name: str) -> tuple[str, int, str] | None:
        """What comes before the number, the number, the rest; None for a name of no layer."""
        found = self._pattern.match(name)
        return (found[1], int(found[2]), name[found.end() :]) if found else None

    def layer(self, value: ir.Value) -> int | None:
        """Number of the layer a value is called after."""
        parts = self.split(value.name or "")
        return parts[1] if parts else None

    def name(self, value: ir.Value, layer: int) -> str:
        """What the value's like in another layer is called."""
        parts = self.split(value.name or "")
        return f"{parts[0]}.{layer}{parts[2]}" if parts else value.name or ""

    def scopes(self, text: str, layer: int) -> str:
        """A list of scopes with another layer's number wherever there is one."""
        return self._pattern.sub(rf"\g<1>.{layer}", text)


def unlike(what: str, seen: object) -> ExportError:
    """Why a component cannot be stamped out."""
    return ExportError(f"layers cannot be stamped out: {what}", seen=seen)
