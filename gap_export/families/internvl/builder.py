"""How InternVL's checkpoints are read, and what its modules are."""

from __future__ import annotations

from gap_export.errors import RecipeError
from gap_export.families.common.builder import ModelBuilder
from gap_export.families.internvl.hf import InternVlHfLayout
from gap_export.families.internvl.intern_vision import InternVisionTower
from gap_export.families.internvl.original import InternVlOriginalLayout
from gap_export.spec.architecture import Architecture


def _tower(architecture: Architecture, num_layers: int) -> InternVisionTower:
    """The tower; the projector says how many patches become one token.

    Raises:
        RecipeError: they do not divide the grid of patches.
    """
    if architecture.token_grid == (0, 0):
        rows, cols = architecture.vision.patch_grid
        raise RecipeError(
            "the projector does not take whole blocks of patches",
            seen=f"width {architecture.projector.width}, {architecture.projector.joined_rows} rows",
            allowed=f"{architecture.vision.width}, the tower's width, times rows and columns that "
            f"divide {rows} x {cols} patches",
        )
    return InternVisionTower(
        architecture.vision, num_layers=num_layers, joined=architecture.joined_patches
    )


INTERNVL = ModelBuilder(layouts=(InternVlHfLayout(), InternVlOriginalLayout()), tower=_tower)
