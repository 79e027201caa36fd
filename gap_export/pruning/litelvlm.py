"""``litelvlm``: tokens that fit the text, and as many of their surroundings (arXiv 2605.13178)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from gap_export.pruning.extent import between
from gap_export.pruning.greedy import Choices, GreedyPruner
from gap_export.pruning.pruner import Reading, VisionState, share_of_largest, wide
from gap_export.pruning.text import TextPruner

if TYPE_CHECKING:
    import torch

_TEXT = TextPruner()


class LiteLvlmPruner(GreedyPruner):
    """Half of K, rounded up, by ``text``'s score; the rest by the attention of CLS.

    The paper finds that the tokens of what is meant are those *least* similar to the text in
    OpenAI's CLIP and ranks so. Whether it is so is a fact about a tower: the recipe's sign, -1 for
    OpenAI's CLIP. The paper's second half goes by attention times the length of the token's value,
    which no tower here shows; by attention alone.
    """

    summary: ClassVar[str] = "patches that fit the expression, and as many that CLS attends to"
    reads: ClassVar[frozenset[Reading]] = frozenset({"text", "cls_attention"})

    def start(self, state: VisionState, *, num_kept_tokens: int) -> Choices:
        """See GreedyPruner; merits are 0..1, of the text or of attention."""
        import torch

        assert state.cls_attention is not None
        fit = between(_TEXT.scores(state), 0.0)
        context = share_of_largest(wide(state.cls_attention))
        left = torch.full_like(fit, num_kept_tokens - num_kept_tokens // 2)

        def follow(
            merits: torch.Tensor, left: torch.Tensor, chosen: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            del merits, chosen
            left = left - 1
            return torch.where(left > 0, fit, context), left

        # A loop's start may not be something that its steps read too.
        return Choices(fit.clone(), left, follow)
