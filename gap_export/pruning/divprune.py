"""``divprune``: tokens as unlike each other as can be (DivPrune, arXiv 2503.02175)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from gap_export.pruning.greedy import Choices, GreedyPruner, rows_at
from gap_export.pruning.pruner import Reading, VisionState, unit

if TYPE_CHECKING:
    import torch

# Above any distance of two directions, which is at most 2.
FAR = 4.0


class DivPrunePruner(GreedyPruner):
    """Max-min distance, greedily, where distance is 1 - cosine of what the decoder reads.

    First the token whose nearest neighbour is farthest; then, again and again, the one that is
    farthest from the nearest of those chosen.
    """

    summary: ClassVar[str] = "patches as unlike each other as can be"
    reads: ClassVar[frozenset[Reading]] = frozenset({"image_embeds"})

    def start(self, state: VisionState, *, num_kept_tokens: int) -> Choices:
        """See GreedyPruner; merits are distances, 0..2."""
        import torch

        del num_kept_tokens
        assert state.image_embeds is not None
        distance = cosine_distances(state.image_embeds)
        index = torch.arange(distance.shape[1], device=distance.device)
        nearest = torch.where(index[:, None] == index, FAR, distance).amin(dim=2)

        def follow(
            merits: torch.Tensor, closest: torch.Tensor, chosen: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            # The first choice went by the neighbours; from now on only distances to chosen count.
            del merits
            closest = torch.minimum(closest, rows_at(distance, chosen))
            return closest, closest.clone()

        far = torch.full_like(nearest, FAR)
        return Choices(nearest, far, follow)


def cosine_distances(embeds: torch.Tensor) -> torch.Tensor:
    """1 - cosine of each two tokens of [B, N, H], the same both ways: [B, N, N]."""
    import torch

    embeds = unit(embeds)
    cosine = torch.matmul(embeds, embeds.transpose(1, 2))
    # A product of matrices may round its two halves differently. Tokens that are each other's
    # nearest must tie, or the first choice would be another one in another runtime.
    return 1 - (cosine + cosine.transpose(1, 2)) / 2
