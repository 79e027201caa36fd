"""``d2pruner``, ``d2pruner-llm``: debiased importance, then an independent set (arXiv 2512.19443).

D2Pruner ranks by what the last word attends to in the LLM's second layer, which is not known before
the LLM: ``d2pruner`` ranks by the attention that a token receives in the vision tower, and
``d2pruner-llm`` by how well it fits the decoder's words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from gap_export.pruning.divprune import cosine_distances
from gap_export.pruning.greedy import Choices, GreedyPruner, rows_at
from gap_export.pruning.pruner import Reading, VisionState, share_of_largest, wide
from gap_export.pruning.select import mark_largest
from gap_export.pruning.text import word_cosines

if TYPE_CHECKING:
    import torch

# As published for grounding: similarity from which on two tokens are neighbors, and how much of it
# is nearness in the image.
_NEIGHBORS, _NEARNESS = 0.8, 0.5
_NOTHING = 1e-12


class D2Pruner(GreedyPruner):
    """Seven tenths of K are those of most debiased importance; the rest are no one's neighbors.

    Importance is divided by what a token's place alone gives. The paper averages that over 1000
    images, which no graph can; here it is what its row and its column give in the same image, the
    product of their means over the mean of all.

    Of the tokens that are left the most important is taken, its neighbors are out, and again; where
    none is left before there are K, the most important of those that are out. Neighbors are two
    tokens whose cosine of what the decoder reads, brought from -1..1 to 0..1, and nearness in the
    image are more than 0.8 in the mean. The paper does not say what its nearness is: here one less
    the distance over the longest in the grid.
    """

    summary: ClassVar[str] = "patches that stand out for their place, then ones unlike and apart"
    reads: ClassVar[frozenset[Reading]] = frozenset(
        {"received_attention", "image_embeds", "places"}
    )

    def start(self, state: VisionState, *, num_kept_tokens: int) -> Choices:
        """See GreedyPruner; merits are shares of the largest importance, less 2 for who is out."""
        import torch

        importance = share_of_largest(self._debiased(state))
        is_pivot = mark_largest(importance, _num_pivots(num_kept_tokens))
        neighbors = (self.similarity(state) > _NEIGHBORS) & ~is_pivot[:, :, None]
        neighbors = torch.where(neighbors, 2.0, 0.0).to(importance.dtype)

        def follow(
            merits: torch.Tensor, is_out: torch.Tensor, chosen: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            del merits
            is_out = torch.maximum(is_out, rows_at(neighbors, chosen))
            return importance - is_out, is_out

        # A loop's start may not be something that its steps read too.
        return Choices(importance.clone(), torch.zeros_like(importance), follow)

    def margins(self, state: VisionState, *, num_kept_tokens: int) -> torch.Tensor:
        """See ChoosingPruner; how close a chosen token's neighbors were to be none counts too."""
        import torch

        closest = super().margins(state, num_kept_tokens=num_kept_tokens)
        chosen = self.choose(state, num_kept_tokens=num_kept_tokens)
        similarity = self.similarity(state)
        for choice in range(_num_pivots(num_kept_tokens), num_kept_tokens):
            row = rows_at(similarity, chosen[:, choice])
            closest = torch.minimum(closest, (row - _NEIGHBORS).abs().amin(dim=1))
        return closest

    def importance(self, state: VisionState) -> torch.Tensor:
        """Before it is debiased, float [B, N], 0 or more."""
        assert state.received_attention is not None
        return wide(state.received_attention)

    def _debiased(self, state: VisionState) -> torch.Tensor:
        import torch

        assert state.places is not None
        importance = self.importance(state)
        prior = 1 / importance.mean(dim=1, keepdim=True).clamp(min=_NOTHING)
        for axis in range(2):
            line = state.places[:, axis]
            weights = torch.where(line[:, None] == line, 1.0, 0.0).to(importance.dtype)
            total = (weights * importance[:, None, :]).sum(dim=-1)
            prior = prior * total / weights.sum(dim=-1)
        return importance / prior.clamp(min=_NOTHING)

    def similarity(self, state: VisionState) -> torch.Tensor:
        """Of each two tokens in features and in place, float [B, N, N] in 0..1."""
        assert state.image_embeds is not None
        assert state.places is not None
        alike = 1 - cosine_distances(state.image_embeds) / 2
        places = state.places.to(alike.dtype)
        distance = (places[:, None] - places).pow(2).sum(dim=-1).sqrt()
        near = 1 - distance / distance.flatten().amax(dim=0).clamp(min=1)
        return _NEARNESS * near + (1 - _NEARNESS) * alike


class LlmD2Pruner(D2Pruner):
    """D2Pruner on a softmax over the tokens of their mean cosine with the decoder's words.

    It reads the text, as D2Pruner does, as :class:`LlmTextPruner` has it.
    """

    summary: ClassVar[str] = "as d2pruner, by how well they fit the decoder's words"
    reads: ClassVar[frozenset[Reading]] = frozenset({"llm_text", "image_embeds", "places"})

    def importance(self, state: VisionState) -> torch.Tensor:
        """See D2Pruner."""
        import torch

        return torch.softmax(word_cosines(state), dim=-1)


def _num_pivots(num_kept_tokens: int) -> int:
    """Seven tenths, rounded down."""
    return 7 * num_kept_tokens // 10
