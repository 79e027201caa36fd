"""From scores to indices, in operators that mean the same in every runtime."""

from __future__ import annotations

import torch

from gap_export.pruning.pruner import Order


def select_tokens(scores: torch.Tensor, *, num_kept_tokens: int, order: Order) -> torch.Tensor:
    """Indices of the best K tokens; of equal scores the lower index wins.

    TopK alone leaves ties to the runtime (torch promises nothing, TensorRT neither), so tokens are
    ranked by pairwise comparison first, and TopK sees ranks, which are never equal.

    Args:
        scores: float [B, N], without NaN.
        num_kept_tokens: K, 1..N.
        order: ``raster``: ascending; ``score``: best first.

    Returns:
        int64 [B, K], unpruned index of each kept token.
    """
    index = torch.arange(scores.shape[1], device=scores.device)
    mine, other = scores[:, :, None], scores[:, None, :]
    beaten = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    rank = beaten.to(torch.int64).sum(dim=-1)
    best_first = torch.topk(rank, num_kept_tokens, dim=1, largest=False, sorted=True).indices
    if order == "score":
        return best_first
    return torch.topk(best_first, num_kept_tokens, dim=1, largest=False, sorted=True).values


def gather_tokens(features: torch.Tensor, keep_indices: torch.Tensor) -> torch.Tensor:
    """Rows of ``features`` [B, N, D] at ``keep_indices`` int64 [B, K]: [B, K, D].

    Written as one Gather over the flattened rows, which every runtime does fast.
    """
    rows, num_tokens, width = features.shape
    first = torch.arange(rows, device=features.device) * num_tokens
    flat = (keep_indices + first[:, None]).reshape(-1)
    kept = features.reshape(rows * num_tokens, width).index_select(0, flat)
    return kept.reshape(rows, keep_indices.shape[1], width)
