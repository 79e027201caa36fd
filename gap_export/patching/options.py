"""What to patch, and how; and what came of it."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gap_export.errors import UnsupportedPrunerError, UsageError
from gap_export.spec.manifest import Manifest
from gap_export.spec.positions import PositionMode

DEFAULT_PRUNER = "spatial"
# Those that a graph pass can put into a graph as it is.
PRUNERS = (DEFAULT_PRUNER, "random", "cls", "fastervlm")
# What a signed 64-bit integer holds, in JSON readers of other languages too.
_MAX_SEED = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class PatchOptions:
    """What to patch, and how.

    Attributes:
        export: Folder of the ONNX export; it stays as it is.
        keep_ratio: Share of the visual tokens to keep, in (0, 1]; None for the recipe's default.
        pruner: Name; None for ``spatial``, which fits every graph.
        positions: ``gap``, or ``compact`` for the naive baseline.
        seed: For the pruner that draws.
        out: Bundle folder; None for ``./<model>-<pruner>-<keep>``.
        force: Replace a bundle that is already there. Other folders are never replaced.
        recipe: That says how the model is asked; None for the export's own, or the one that fits.
        variant: ``fp32`` or ``fp16``; None where there is one file of each component.
        copy_weights: Copy weight files that could be linked.
    """

    export: Path
    keep_ratio: float | None = None
    pruner: str | None = None
    positions: PositionMode = "gap"
    seed: int = 0
    out: Path | None = None
    force: bool = False
    recipe: str | None = None
    variant: str | None = None
    copy_weights: bool = False


@dataclass(frozen=True, kw_only=True)
class PatchReport:
    """What patching left behind.

    Attributes:
        bundle: The bundle's folder.
        manifest: Its manifest.
        rotary: Nodes that see the remapped ids.
        warnings: What the user should know of the export.
    """

    bundle: Path
    manifest: Manifest
    rotary: tuple[str, ...]
    warnings: tuple[str, ...]

    def to_plain(self) -> dict[str, Any]:
        """JSON form."""
        pruning = self.manifest.pruning
        return {
            "bundle": str(self.bundle),
            "model": self.manifest.model.name,
            "pruner": pruning.pruner,
            "positions": pruning.positions,
            "keep_ratio": pruning.keep_ratio,
            "num_visual_tokens": pruning.num_visual_tokens,
            "num_kept_tokens": pruning.num_kept_tokens,
            "dtype": self.manifest.dtype,
            "opset": self.manifest.opset,
            "rotary": list(self.rotary),
            "warnings": list(self.warnings),
        }


def check_pruner(name: str, seed: int) -> None:
    """Refuse what no pass puts into a foreign graph; needs no onnx.

    Raises:
        UnsupportedPrunerError: another pruner.
        UsageError: a seed out of range.
    """
    if name not in PRUNERS:
        raise UnsupportedPrunerError(
            "this pruner cannot be put into a graph that is exported already",
            seen=reprlib.repr(name),
            allowed=", ".join(PRUNERS),
            fix="others read what such a graph does not give, as text does a text tower; for them "
            "export the model from its checkpoint: gap-export MODEL --pruner NAME",
        )
    if not 0 <= seed <= _MAX_SEED:
        raise UsageError("seed out of range", seen=reprlib.repr(seed), allowed=f"0..{_MAX_SEED}")
