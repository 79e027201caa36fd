"""``visionzip``: dominant tokens, and context merged into some others (VisionZip, 2412.04467).

``visionzip-received`` is its rule where there is no CLS token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from gap_export.pruning.fastervlm import FasterVlmPruner
from gap_export.pruning.pruner import Reading, VisionState, unit
from gap_export.pruning.select import first_of_largest, gather_tokens, is_among, rank_tokens

if TYPE_CHECKING:
    import torch


def split_budget(num_kept_tokens: int) -> tuple[int, int]:
    """Dominant and contextual tokens of K: 54 and 10 of 64, as published, rounded half up."""
    contextual = (num_kept_tokens * 10 + 32) // 64
    return num_kept_tokens - contextual, contextual


class VisionZipPruner(FasterVlmPruner):
    """VisionZip without its CLS token, which has no place in the image.

    Dominant are the tokens that CLS attends to most, as :class:`FasterVlmPruner` has it. Of
    the M others, in raster order, every floor(M / C)-th becomes a target, C of them; to each target
    the mean of those others is added whose key is most similar to its own. Keys are averaged over
    the heads. ``score`` order is the authors': dominant, then contextual, each ascending.
    """

    summary: ClassVar[str] = "patches the CLS token attends to; the others merged into a few"
    reads: ClassVar[frozenset[Reading]] = frozenset({"cls_attention", "keys"})
    merges_by: ClassVar[Literal["keys", "next_keys"] | None] = "keys"

    def priorities(self, scores: torch.Tensor, *, num_kept_tokens: int) -> torch.Tensor:
        """Dominant ascending, targets ascending, all others."""
        import torch

        num_tokens = scores.shape[1]
        num_dominant, num_contextual = split_budget(num_kept_tokens)
        is_rest = rank_tokens(scores) >= num_dominant
        index = torch.arange(num_tokens, device=scores.device)
        step = max((num_tokens - num_dominant) // max(num_contextual, 1), 1)
        place = is_rest.to(torch.int64).cumsum(dim=1) - 1
        is_target = is_rest & (place % step == 0) & (place < step * num_contextual)
        late = torch.where(is_target, num_tokens + index, 2 * num_tokens + index)
        return torch.where(is_rest, late, index)

    def merge(
        self, state: VisionState, scores: torch.Tensor, keep_indices: torch.Tensor
    ) -> torch.Tensor:
        """Float [B, K, D]."""
        import torch

        assert state.keys is not None
        features, keys = state.patch_features, unit(state.keys)
        num_tokens = features.shape[1]
        num_dominant, _ = split_budget(keep_indices.shape[1])
        is_dominant = rank_tokens(scores) < num_dominant
        is_kept = is_among(keep_indices, num_tokens)
        is_target = is_kept & ~is_dominant
        # Of each token (row) with each target; below any cosine for what is no target.
        similarity = torch.matmul(keys, keys.transpose(1, 2))
        similarity = torch.where(is_target[:, None, :], similarity, -2.0)
        joins = torch.where(is_kept, -1, first_of_largest(similarity))
        members = (keep_indices[:, :, None] == joins[:, None, :]) & gather_tokens(
            is_target.to(torch.int64)[:, :, None], keep_indices
        ).to(torch.bool)
        weights = members.to(features.dtype)
        weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1)
        return gather_tokens(features, keep_indices) + torch.matmul(weights, features)


class VisionZipReceivedPruner(VisionZipPruner):
    """VisionZip whose dominant tokens are those that receive most attention, over all queries.

    So its authors have it for towers without a CLS token.
    """

    summary: ClassVar[str] = "as visionzip, by the attention that all tokens give; needs no CLS"
    reads: ClassVar[frozenset[Reading]] = frozenset({"received_attention", "keys"})
    attention: ClassVar[Literal["cls_attention", "received_attention"]] = "received_attention"
