"""What to patch, and how; and what came of it."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gap_export.errors import UnsupportedPrunerError, UsageError
from gap_export.pruning.resolve import check_seed
from gap_export.spec.manifest import Manifest
from gap_export.spec.requests import DEFAULT_PRUNING, PruningRequest, options_of

DEFAULT_PRUNER = "spatial"
# Those that a graph pass can put into a graph as it is.
PRUNERS = (DEFAULT_PRUNER, "random", "cls", "fastervlm")
# The other choices of a request take an export from the checkpoint.
CHOICES = ("keep_ratio", "pruner", "positions", "canvas", "seed")


@dataclass(frozen=True, kw_only=True)
class PatchOptions:
    """What to patch, and how.

    Attributes:
        export: Folder of the ONNX export; it stays as it is.
        pruning: Which visual tokens survive; by default by ``spatial``, which fits every graph.
        out: Bundle folder; None for ``./<model>-<pruner>-<keep>``.
        force: Replace a bundle that is already there. Other folders are never replaced.
        recipe: Says how the model is asked; None for the export's own, or the one that fits.
        variant: ``fp32`` or ``fp16``; None where there is one file of each component.
        copy_weights: Copy weight files that could be linked.
    """

    export: Path
    pruning: PruningRequest = DEFAULT_PRUNING
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
        manifest: The bundle's manifest.
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


def check_request(request: PruningRequest) -> None:
    """Refuse what no pass puts into a foreign graph; needs no onnx.

    Raises:
        UnsupportedPrunerError: another pruner.
        UsageError: a choice that only an export has.
    """
    if request.pruner is not None and request.pruner not in PRUNERS:
        raise UnsupportedPrunerError(
            "this pruner cannot be put into a graph that is exported already",
            seen=reprlib.repr(request.pruner),
            allowed=", ".join(PRUNERS),
            fix="others need what such a graph does not give, as text does a text tower; for them "
            "export the model from its checkpoint: gap-export MODEL --pruner NAME",
        )
    defaults = DEFAULT_PRUNING
    check_seed(request.seed)
    for each in options_of(PruningRequest):
        given = getattr(request, each.name)
        if each.name not in CHOICES and given != getattr(defaults, each.name):
            raise UsageError(
                f"{each.flag} cannot be had in a graph that is exported already",
                seen=given,
                fix=f"leave out {each.flag}, or export the model from its checkpoint",
            )
