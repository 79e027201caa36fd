"""Pruners, one file each. A new one is a file and a line in ``presets.py``, or an entry point."""

from __future__ import annotations

from gap_export.pruning.greedy import Choices, GreedyPruner
from gap_export.pruning.preset import Preset
from gap_export.pruning.presets import (
    ENTRY_POINT_GROUP,
    LEFT_OUT,
    PACKAGE_MARK,
    PRESETS,
    all_presets,
    broken_presets,
    check_pruner_installed,
    find_preset,
    find_pruner,
    package_of,
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
    "PACKAGE_MARK",
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
    "check_pruner_installed",
    "find_preset",
    "find_pruner",
    "package_of",
]
