"""``cls``: tokens most like the image as a whole (GAP's baseline, arXiv 2506.21873)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from gap_export.pruning.pruner import Reading, ScoringPruner, VisionState, dot, unit

if TYPE_CHECKING:
    import torch


class ClsPruner(ScoringPruner):
    """Cosine of the CLS feature and each patch feature, at the select layer."""

    summary: ClassVar[str] = "patches most similar to the CLS token"
    reads: ClassVar[frozenset[Reading]] = frozenset({"cls_features"})

    def scores(self, state: VisionState) -> torch.Tensor:
        """Float [B, N] in -1..1."""
        assert state.cls_features is not None
        return dot(unit(state.patch_features), unit(state.cls_features))
