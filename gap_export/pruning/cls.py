"""``cls``: tokens most like the picture as a whole."""

from __future__ import annotations

from typing import ClassVar

import torch

from gap_export.pruning.pruner import Reading, ScoringPruner, VisionState

# A zero vector is like nothing: its cosine is 0, not NaN.
_SMALLEST_NORM = 1e-8


class ClsPruner(ScoringPruner):
    """Cosine of the CLS feature and each patch feature, at the select layer."""

    name: ClassVar[str] = "cls"
    summary: ClassVar[str] = "patches most similar to the CLS token"
    reads: ClassVar[frozenset[Reading]] = frozenset({"cls_features"})

    def scores(self, state: VisionState) -> torch.Tensor:
        """Float32 [B, N] in -1..1."""
        assert state.cls_features is not None
        return torch.matmul(_unit(state.patch_features), _unit(state.cls_features)[:, :, None])[
            :, :, 0
        ]


def _unit(vectors: torch.Tensor) -> torch.Tensor:
    vectors = vectors.float()
    norm = vectors.pow(2).sum(dim=-1, keepdim=True).sqrt()
    return vectors / norm.clamp(min=_SMALLEST_NORM)
