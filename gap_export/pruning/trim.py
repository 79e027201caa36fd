"""``trim``: tokens that fit the question, and the mean of the others (TRIM, arXiv 2409.10994)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from gap_export.pruning.pruner import VisionState
from gap_export.pruning.text import TextPruner

if TYPE_CHECKING:
    import torch


class TrimPruner(TextPruner):
    """Softmax over the patches of ``text``'s score.

    The softmax does not change who is best, but how far the best stand out, which is what adaptive
    numbers go by. TRIM's extra token is the ``mean`` of what was dropped, and its text the whole
    question, cut to what CLIP reads.
    """

    summary: ClassVar[str] = "as text, of the question, by a softmax; with the mean of the dropped"

    def scores(self, state: VisionState) -> torch.Tensor:
        """Float [B, N] in 0..1, 1 in a row's sum."""
        import torch

        return torch.softmax(super().scores(state), dim=-1)

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        """The softmax itself."""
        return scores
