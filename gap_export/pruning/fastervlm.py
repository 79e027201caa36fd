"""``fastervlm``: tokens that CLS attends to (FasterVLM, arXiv 2412.01818).

``fastervlm-received`` is its rule where there is no CLS token: tokens that all others attend to.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from gap_export.pruning.pruner import Reading, ScoringPruner, VisionState, wide

if TYPE_CHECKING:
    import torch


class FasterVlmPruner(ScoringPruner):
    """Attention of CLS to each patch in the layer that produced the features, averaged over heads.

    The softmax runs over CLS and patches; the CLS column is left out afterwards.

    Attributes:
        attention: Whose attention it ranks by.
    """

    attention: ClassVar[Literal["cls_attention", "received_attention"]] = "cls_attention"

    summary: ClassVar[str] = "patches the CLS token attends to"
    reads: ClassVar[frozenset[Reading]] = frozenset({"cls_attention"})

    def scores(self, state: VisionState) -> torch.Tensor:
        """Float [B, N] in 0..1."""
        attention: torch.Tensor | None = getattr(state, self.attention)
        assert attention is not None
        return wide(attention)

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        """The attention itself."""
        return scores


class FasterVlmReceivedPruner(FasterVlmPruner):
    """FasterVLM's rule on the attention that a token receives, over heads and all queries.

    Of a tower that has a CLS token its query is one among them.
    """

    summary: ClassVar[str] = "as fastervlm, by the attention that all tokens give; needs no CLS"
    reads: ClassVar[frozenset[Reading]] = frozenset({"received_attention"})
    attention: ClassVar[Literal["cls_attention", "received_attention"]] = "received_attention"
