"""Pruners, one file each. A new one is a file and a line here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import MappingProxyType

from gap_export.errors import UsageError
from gap_export.pruning.cls import ClsPruner
from gap_export.pruning.fastervlm import FasterVlmPruner
from gap_export.pruning.pruner import (
    FixedPruner,
    Order,
    Pruner,
    Reading,
    ScoringPruner,
    VisionState,
)
from gap_export.pruning.spatial import SpatialPruner
from gap_export.pruning.text import TextPruner
from gap_export.pruning.uniform_random import RandomPruner

__all__ = [
    "PRUNERS",
    "FixedPruner",
    "Order",
    "Pruner",
    "Reading",
    "ScoringPruner",
    "VisionState",
    "find_pruner",
]

PRUNERS: Mapping[str, Pruner] = MappingProxyType(
    {
        pruner.name: pruner
        for pruner in (
            ClsPruner(),
            TextPruner(),
            RandomPruner(),
            SpatialPruner(),
            FasterVlmPruner(),
        )
    }
)


def find_pruner(name: str) -> Pruner:
    """The pruner of that name.

    Raises:
        UsageError: there is none; the nearest names are suggested.
    """
    if name in PRUNERS:
        return PRUNERS[name]
    near = difflib.get_close_matches(name, PRUNERS, n=2, cutoff=0.4)
    raise UsageError(
        "no pruner of that name",
        seen=name,
        allowed=", ".join(PRUNERS),
        fix=f"did you mean {' or '.join(near)}?" if near else None,
    )
