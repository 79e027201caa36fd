"""What the pre-flight says of a graph, one thing at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["blocked", "unverified", "note"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing.

    Attributes:
        kind: ``blocked``: will not build; ``unverified``: nobody knows; ``note``: to be read, but
            no reason for doubt.
        operator: Which it is about; None: the graph as a whole.
        reason: For people, one line, without full stop.
    """

    kind: Kind
    operator: str | None
    reason: str

    @property
    def counts(self) -> bool:
        """Whether it keeps the graph from being fine."""
        return self.kind != "note"
