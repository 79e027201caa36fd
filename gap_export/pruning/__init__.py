"""Pruners, one file each. A new one is a file and a line in ``presets.py``, or an entry point."""

from __future__ import annotations

from gap_export.pruning.greedy import Choices, GreedyPruner
from gap_export.pruning.preset import Preset
from gap_export.pruning.presets import (
    ENTRY_POINT_GROUP,
    LEFT_OUT,
    PRESETS,
    all_presets,
    broken_presets,
    find_preset,
    find_pruner,
)
from gap_export.pruning.pruner import (
    ChoosingPruner,
    FixedPruner,
    Pruner,
    Reading,
    ScoringPruner,
    VisionState,
)

__all__ = [
    "ENTRY_POINT_GROUP",
    "LEFT_OUT",
    "PRESETS",
    "Choices",
    "ChoosingPruner",
    "FixedPruner",
    "GreedyPruner",
    "Preset",
    "Pruner",
    "Reading",
    "ScoringPruner",
    "VisionState",
    "all_presets",
    "broken_presets",
    "find_preset",
    "find_pruner",
]
