"""References of the small checkpoints, without an export."""

from __future__ import annotations

from pathlib import Path

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.families import Reference, build_reference, resolve_pruning
from gap_export.spec.recipe import load_recipe
from gap_export.spec.requests import PruningRequest


def reference_of(
    folder: Path, dtype: str | None = None, pruner: str = "spatial", *, device: str = "meta"
) -> Reference:
    """A checkpoint's model, pruned to 0.3 of its visual tokens."""
    recipe = load_recipe(folder / "recipe.yaml")
    request = PruningRequest(pruner=pruner, keep_ratio=0.3, order="raster")
    pruning = resolve_pruning(recipe, request)
    return build_reference(recipe, Checkpoint.of(folder), pruning, device=device, dtype=dtype)
