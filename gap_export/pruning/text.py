"""``text``: tokens that fit the expression.

The score is TRIM's (arXiv 2409.10994), without its extra token.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from gap_export.pruning.pruner import Reading, ScoringPruner, VisionState


class TextPruner(ScoringPruner):
    """Dot product of patch and text in CLIP's joint space, not normalised, times the recipe's sign.

    The text's length is common to all patches, but a patch's is not: normalising would give
    another pruner.
    """

    name: ClassVar[str] = "text"
    summary: ClassVar[str] = "patches that fit the expression, by the CLIP text tower"
    reads: ClassVar[frozenset[Reading]] = frozenset({"text"})

    def scores(self, state: VisionState) -> torch.Tensor:
        """Float32 [B, N]."""
        assert state.patch_embeds is not None
        assert state.text_embeds is not None
        patches, text = state.patch_embeds.float(), state.text_embeds.float()
        return state.text_similarity_sign * torch.matmul(patches, text[:, :, None])[:, :, 0]
