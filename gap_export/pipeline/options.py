"""What to export, and how; and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gap_export.errors import UsageError
from gap_export.extras import require_extra
from gap_export.manifest import (
    Budget,
    ExtraPosition,
    ExtraToken,
    Manifest,
    Order,
    PruningSpec,
)
from gap_export.positions import PositionMode
from gap_export.recipe import Recipe

Dtype = Literal["float32", "float16", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "float16", "bfloat16")
# Held so, a file takes no room of its own.
_SHARED = ("linked", "cloned")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to export, and how.

    Attributes:
        model: Recipe name, alias, hub id, or a checkpoint folder.
        keep_ratio: Share of the visual tokens to keep, in (0, 1]; None for the recipe's default.
        pruner: Name; None for the recipe's default.
        order: ``raster``: kept tokens ascend; ``score``: best first; None for the pruner's.
        extra_token: What stands for the dropped tokens: ``none``, their ``mean``, or their sum
            ``weighted`` by score; None for the pruner's.
        extra_position: Its id: that of the ``last`` visual token, or of the ``centroid``.
        budget: ``fixed``: the share of every picture; ``adaptive``: what stands out of each, that
            share at most; None for the pruner's where no share is given, else fixed.
        positions: ``gap``, or ``compact`` for the naive baseline.
        seed: For pruners that draw, and for random weights.
        out: Bundle folder; None for ``./<model>-<pruner>-<keep>``.
        force: Replace a bundle that is already there. Other folders are never replaced.
        recipe: Recipe for a checkpoint folder that has no recipe.yaml of its own.
        checkpoint: Parts of the checkpoint by role, where they are not to be looked for.
        dtype: Of all weights and of the graphs' interfaces; None for the checkpoint's own.
        copy_weights: Copy weights that could be linked, so that the bundle is a folder like any
            other: some ONNX tools refuse links.
        random_weights: Take no checkpoint; draw weights of the true shape from the seed.
    """

    model: str
    keep_ratio: float | None = None
    pruner: str | None = None
    order: Order | None = None
    extra_token: ExtraToken | None = None
    extra_position: ExtraPosition = "last"
    budget: Budget | None = None
    positions: PositionMode = "gap"
    seed: int = 0
    out: Path | None = None
    force: bool = False
    recipe: str | None = None
    checkpoint: Mapping[str, Path] = field(default_factory=dict)
    dtype: Dtype | None = None
    copy_weights: bool = False
    random_weights: bool = False


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export left behind.

    Attributes:
        bundle: The bundle's folder.
        manifest: Its manifest.
        seconds: Wall time of each step.
    """

    bundle: Path
    manifest: Manifest
    seconds: dict[str, float]

    def to_plain(self) -> dict[str, Any]:
        """JSON form."""
        pruning = self.manifest.pruning
        return {
            "bundle": str(self.bundle),
            "model": self.manifest.model.name,
            "pruner": pruning.pruner,
            "order": pruning.order,
            "extra_token": pruning.extra_token,
            "budget": pruning.budget,
            "positions": pruning.positions,
            "keep_ratio": pruning.keep_ratio,
            "num_visual_tokens": pruning.num_visual_tokens,
            "num_kept_tokens": pruning.num_kept_tokens,
            "dtype": self.manifest.dtype,
            "graphs": [graph.file for graph in self.manifest.graphs],
            "size_bytes": sum(f.size for f in self.manifest.files),
            "new_bytes": sum(f.size for f in self.manifest.files if f.held not in _SHARED),
            "seconds": self.seconds,
        }


def resolve_options(recipe: Recipe, options: ExportOptions) -> PruningSpec:
    """What the options mean for a model; nothing is exported yet.

    Raises:
        UsageError: an option is out of range, or the model cannot serve the pruner.
        MissingDependencyError: the ``export`` extra is not installed.
    """
    require_extra("export", "exporting a model")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise UsageError("no such dtype", seen=repr(options.dtype), allowed=", ".join(DTYPES))
    if options.random_weights and options.checkpoint:
        raise UsageError(
            "random weights need no checkpoint",
            seen=", ".join(options.checkpoint),
            fix="leave out one of the two",
        )
    from gap_export.families import resolve_pruning

    return resolve_pruning(
        recipe,
        pruner=options.pruner,
        keep_ratio=options.keep_ratio,
        order=options.order,
        positions=options.positions,
        seed=options.seed,
        extra_token=options.extra_token,
        extra_position=options.extra_position,
        budget=options.budget,
    )
