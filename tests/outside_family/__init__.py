"""A family that lives outside gap_export: SigLIP's tower, a projector, and Phi's decoder.

Nothing in gap_export knows of it. A package brings it by an entry point::

    [project.entry-points."gap_export.families"]
    phi_siglip = "outside_family:PHI_SIGLIP"

Read on in model.py (what is computed), checkpoint.py (where the weights are), images.py (how an
image is prepared) and recipes/tiny-phi/recipe.yaml (a model of the family).
"""

from __future__ import annotations

from pathlib import Path

from gap_export.spec.family import Family

PHI_SIGLIP = Family(
    name="phi_siglip",
    # Imported when a model is built; here nothing imports PyTorch.
    builder=f"{__name__}.checkpoint:BUILDER",
    # SigLIP has no CLS token: the pruners that need one are not offered.
    readings=frozenset({"image_embeds", "keys"}),
    # A name that recipes use; found on devices, too, so nothing there imports PyTorch.
    preparations={"center_crop": f"{__name__}.images:CENTER_CROP"},
    recipes=Path(__file__).parent / "recipes",
)
