"""``prumerge``: tokens CLS attends to, each merged with its like (LLaVA-PruMerge, 2403.15388)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from gap_export.pruning.pruner import Reading, ScoringPruner, VisionState, unit, wide
from gap_export.pruning.select import gather_tokens, mark_largest, rank_tokens

if TYPE_CHECKING:
    import torch

_NUM_NEIGHBOURS = 32


class PruMergeSelection(ScoringPruner):
    """PruMerge without the merging.

    The score is the attention of CLS in the tower's layer behind the select layer, all heads taken
    as one: softmax(q k^T / sqrt(D)) of CLS's row, CLS's own column left out.
    """

    summary: ClassVar[str] = "patches that CLS attends to in the next layer, heads taken as one"
    reads: ClassVar[frozenset[Reading]] = frozenset({"next_layer"})

    def scores(self, state: VisionState) -> torch.Tensor:
        """Float [B, N] in 0..1, less than 1 in a row's sum."""
        assert state.next_attention is not None
        return wide(state.next_attention)

    def weights(self, scores: torch.Tensor) -> torch.Tensor:
        """The attention itself."""
        return scores


class PruMergePruner(PruMergeSelection):
    """PruMerge: to each survivor the 32 tokens of the most similar keys are added.

    x'_i = x_i + sum over j of T_i of a_j x_j, where T_i are the 32 tokens other than i, kept or
    not, with the largest cosine of keys. The weights are not normalised and x is the original, as
    its authors have it. With fewer than 33 tokens all others are taken.
    """

    summary: ClassVar[str] = "as prumerge-select, each merged with the 32 of most similar keys"
    merges_by: ClassVar[Literal["keys", "next_keys"] | None] = "next_keys"

    def merge(
        self, state: VisionState, scores: torch.Tensor, keep_indices: torch.Tensor
    ) -> torch.Tensor:
        """Float [B, K, D]."""
        import torch

        assert state.next_keys is not None
        keys, features = unit(state.next_keys), state.patch_features
        num_tokens = features.shape[1]
        similarity = torch.matmul(gather_tokens(keys, keep_indices), keys.transpose(1, 2))
        index = torch.arange(num_tokens, device=features.device)
        # Below any cosine: no token is its own neighbor.
        similarity = torch.where(keep_indices[:, :, None] == index, -2.0, similarity)
        near = mark_largest(similarity, min(_NUM_NEIGHBOURS, num_tokens - 1))
        weights = torch.where(near, scores[:, None, :], 0.0).to(features.dtype)
        return gather_tokens(features, keep_indices) + torch.matmul(weights, features)


class PruMergePlusPruner(PruMergePruner):
    """PruMerge+: a quarter of the tokens by attention, the others spread evenly.

    Its authors add to the n outliers every floor(floor(N / n) / 3)-th token, that is about three
    for each outlier. With K given, that is D = round(K / 4), at least 1, by attention, and the
    places floor(j N / M), j < M = K - D. Where a place is taken already the next best by attention
    comes in, so that it is K tokens, all different.
    """

    summary: ClassVar[str] = "a quarter as prumerge, the rest spread evenly; merged likewise"

    def priorities(self, scores: torch.Tensor, *, num_kept_tokens: int) -> torch.Tensor:
        """By attention, then the spread ones ascending, then all others by attention."""
        import torch

        num_tokens = scores.shape[1]
        num_best = max((num_kept_tokens + 2) // 4, 1)
        num_spread = num_kept_tokens - num_best
        rank = rank_tokens(scores)
        index = torch.arange(num_tokens, device=scores.device)
        # i is floor(j N / M) of the j that is i M / N rounded up, or of none.
        nearest = (index * num_spread + num_tokens - 1) // num_tokens
        is_spread = nearest * num_tokens < (index + 1) * num_spread
        others = torch.where(is_spread, num_tokens + index, 2 * num_tokens + rank)
        return torch.where(rank < num_best, rank, others)
