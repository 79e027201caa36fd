"""Shikra: CLIP tower with CLS, one linear layer as projector, LLaMA decoder with three more tokens.

Its image stands in mid-sentence, which is a matter of the recipe's prompt.
"""

from __future__ import annotations

from gap_export.families.common.checkpoints.whole import WholeLayout
from gap_export.families.common.clip_llama import ClipLlamaFamily
from gap_export.families.common.modules.expected import expected_clip_llama
from gap_export.families.shikra.delta import ShikraDeltaLayout, ShikraMergedLayout

SHIKRA = ClipLlamaFamily(
    name="shikra",
    layouts=(
        ShikraDeltaLayout(),
        ShikraMergedLayout(),
        WholeLayout(family="shikra", expected_tensors=expected_clip_llama),
    ),
)
