"""``extent``, ``extent-llm``: tokens that say most, each unlike those chosen before it.

Our own. What a token says is read off the norm of what the decoder reads of it, which any tower
and any projector give; ``extent-llm`` reads the expression besides.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from gap_export.pruning.divprune import FAR, cosine_distances
from gap_export.pruning.greedy import Choices, GreedyPruner, rows_at
from gap_export.pruning.pruner import Reading, VisionState, wide
from gap_export.pruning.text import word_cosines

if TYPE_CHECKING:
    import torch

# Weight of the token of least norm, where the largest has 1: chosen on RefShapes' training split.
_LEAST_WEIGHT = 0.4
# As much for the token that fits the words least.
_LEAST_FIT = 0.1
_ALL_ALIKE = 1e-6


class ExtentPruner(GreedyPruner):
    """Max-min distance as DivPrune has it, weighted by norms.

    A token's merit is w_i min_j (1 - cos(x_i, x_j)) over the tokens j chosen so far, where x is
    what the decoder reads and w_i is 0.4 for the shortest and 1 for the longest vector of an image,
    in proportion between; first is the longest. Weights keep outliers that say little from being
    chosen for being unlike all others; distances keep one large object from taking every token.
    """

    summary: ClassVar[str] = "patches that say most by their norm, as unlike each other as can be"
    reads: ClassVar[frozenset[Reading]] = frozenset({"image_embeds"})

    def start(self, state: VisionState, *, num_kept_tokens: int) -> Choices:
        """See GreedyPruner; merits are weighted distances, 0..2."""
        import torch

        del num_kept_tokens
        weights, distance = self.weights(state), self.distances(state)

        def follow(
            merits: torch.Tensor, closest: torch.Tensor, chosen: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            del merits
            closest = torch.minimum(closest, rows_at(distance, chosen))
            return weights * closest, closest

        # A loop's start may not be something that its steps read too.
        return Choices(weights.clone(), torch.full_like(weights, FAR), follow)

    def weights(self, state: VisionState) -> torch.Tensor:
        """How much each token counts, float [B, N] in 0..1."""
        return between(norms(state), _LEAST_WEIGHT)

    def distances(self, state: VisionState) -> torch.Tensor:
        """How unlike each two are, float [B, N, N] in 0..2."""
        assert state.image_embeds is not None
        return cosine_distances(state.image_embeds)


class LlmExtentPruner(ExtentPruner):
    """``extent``, its weights times how well a token fits the expression.

    The fit is the mean cosine with the decoder's words, as :class:`LlmTextPruner` has it, brought
    to 0.1..1 within an image.
    """

    summary: ClassVar[str] = "as extent, and by how well they fit the decoder's words"
    reads: ClassVar[frozenset[Reading]] = frozenset({"llm_text", "image_embeds"})

    def weights(self, state: VisionState) -> torch.Tensor:
        """See ExtentPruner."""
        return super().weights(state) * between(word_cosines(state), _LEAST_FIT)


def norms(state: VisionState) -> torch.Tensor:
    """Length of what the decoder reads of each token, float [B, N]."""
    assert state.image_embeds is not None
    return wide(state.image_embeds).pow(2).sum(dim=-1).sqrt()


def between(values: torch.Tensor, least: float) -> torch.Tensor:
    """Float [B, N] in ``least``..1 within each image; all ``least`` where they are alike."""
    low, high = values.amin(dim=1, keepdim=True), values.amax(dim=1, keepdim=True)
    return least + (1 - least) * (values - low) / (high - low).clamp(min=_ALL_ALIKE)
