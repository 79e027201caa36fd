"""``dart``: tokens least like a few pivots (DART, arXiv 2502.11494), on what the decoder reads.

DART itself works inside the LLM, behind its second layer. NVIDIA's TensorRT-Edge-LLM applies it to
embeddings before the LLM, and so does this: the pivots are the image's alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from gap_export.pruning.pruner import ChoosingPruner, Reading, VisionState, unit, wide
from gap_export.pruning.select import gather_tokens, rank_tokens

if TYPE_CHECKING:
    import torch

_NUM_PIVOTS = 4


class DartPruner(ChoosingPruner):
    """Pivots are the 4 embeddings of largest L1 norm; each brings those least like itself.

    The R = K - 4 others are shared out evenly: pivot p brings floor((p+1) R / 4) - floor(p R / 4)
    of the tokens not chosen yet whose cosine with it is lowest. With K below 4, K pivots.
    """

    summary: ClassVar[str] = "patches least like a few pivots of large norm"
    reads: ClassVar[frozenset[Reading]] = frozenset({"image_embeds"})

    def choose(self, state: VisionState, *, num_kept_tokens: int) -> torch.Tensor:
        """int64 [B, K]."""
        import torch

        assert state.image_embeds is not None
        embeds = unit(state.image_embeds)
        num_tokens = embeds.shape[1]
        num_pivots = min(_NUM_PIVOTS, num_kept_tokens)
        others = num_kept_tokens - num_pivots
        norms = wide(state.image_embeds).abs().sum(dim=-1)
        by_norm = rank_tokens(norms)
        pivots = torch.topk(by_norm, num_pivots, dim=1, largest=False, sorted=True).indices
        # Of each pivot with each token.
        similarity = torch.matmul(gather_tokens(embeds, pivots), embeds.transpose(1, 2))
        is_taken = by_norm < num_pivots
        chosen = [pivots]
        for pivot in range(num_pivots):
            count = (pivot + 1) * others // num_pivots - pivot * others // num_pivots
            if count == 0:
                continue
            rank = rank_tokens(-similarity[:, pivot]) + num_tokens * is_taken.to(torch.int64)
            brought = torch.topk(rank, count, dim=1, largest=False, sorted=True)
            is_taken = is_taken | (rank <= brought.values[:, -1:])
            chosen.append(brought.indices)
        return torch.cat(chosen, dim=1)
