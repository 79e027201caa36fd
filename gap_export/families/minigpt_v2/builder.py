"""How MiniGPT-v2's checkpoints are read, and what its modules are."""

from __future__ import annotations

from gap_export.errors import RecipeError
from gap_export.families.common.builder import ModelBuilder
from gap_export.families.common.checkpoints.whole import WholeLayout
from gap_export.families.minigpt_v2.eva_vision import EvaVisionTower
from gap_export.families.minigpt_v2.published import MiniGptV2Layout
from gap_export.spec.architecture import Architecture


def _tower(architecture: Architecture, num_layers: int) -> EvaVisionTower:
    """The tower; the projector's width says how many patches become one token.

    ``ln_vision`` is ``tower.post_layernorm``.

    Raises:
        RecipeError: no whole number of patches, or one that does not divide a row.
    """
    width, side = architecture.vision.width, architecture.vision.patch_grid[1]
    down, join = architecture.joined_patches
    if down != 1 or not join or side % join:
        raise RecipeError(
            "the projector does not take whole patches of one row",
            seen=f"width {architecture.projector.width}",
            allowed=f"{width}, the tower's width, times a divisor of {side}, its patches in a row",
        )
    return EvaVisionTower(architecture.vision, num_layers=num_layers, join=join)


MINIGPT_V2 = ModelBuilder(
    layouts=(MiniGptV2Layout(), WholeLayout(family="minigpt_v2")), tower=_tower
)
