"""``text``: tokens that fit the expression (GAP's baseline, arXiv 2506.21873).

The score is TRIM's (arXiv 2409.10994), without its softmax and its extra token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from gap_export.pruning.pruner import Reading, ScoringPruner, VisionState, dot, wide

if TYPE_CHECKING:
    import torch


class TextPruner(ScoringPruner):
    """Dot product of patch and text in CLIP's joint space, not normalised, times the recipe's sign.

    The text's length is common to all patches, but a patch's is not: normalising would give
    another pruner.
    """

    summary: ClassVar[str] = "patches that fit the expression, by the CLIP text tower"
    reads: ClassVar[frozenset[Reading]] = frozenset({"text"})

    def scores(self, state: VisionState) -> torch.Tensor:
        """Float [B, N]."""
        assert state.patch_embeds is not None
        assert state.text_embeds is not None
        patches, text = wide(state.patch_embeds), wide(state.text_embeds)
        return state.text_similarity_sign * dot(patches, text)
