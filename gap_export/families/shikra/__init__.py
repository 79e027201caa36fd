"""Shikra: CLIP tower with CLS, one linear layer as projector, LLaMA decoder with three more tokens.

Its image stands in mid-sentence, which is a matter of the recipe's prompt.
"""

from __future__ import annotations

from gap_export.families.common.readings import CLIP
from gap_export.spec.family import Family

SHIKRA = Family(
    name="shikra",
    builder="gap_export.families.shikra.builder:SHIKRA",
    readings=CLIP,
    protocol="shikra",
)
