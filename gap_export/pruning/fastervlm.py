"""``fastervlm``: tokens that CLS attends to (FasterVLM, arXiv 2412.01818)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from gap_export.pruning.pruner import Reading, ScoringPruner, VisionState, wide

if TYPE_CHECKING:
    import torch


class FasterVlmPruner(ScoringPruner):
    """Attention of CLS to each patch in the layer that produced the features, averaged over heads.

    The softmax runs over CLS and patches; the CLS column is left out afterwards.
    """

    summary: ClassVar[str] = "patches the CLS token attends to"
    reads: ClassVar[frozenset[Reading]] = frozenset({"cls_attention"})

    def scores(self, state: VisionState) -> torch.Tensor:
        """Float [B, N] in 0..1."""
        assert state.cls_attention is not None
        return wide(state.cls_attention)

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        """The attention itself."""
        return scores
