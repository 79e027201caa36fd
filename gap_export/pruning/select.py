"""From scores to indices, in operators that mean the same in every runtime.

TopK alone leaves ties to the runtime (torch promises nothing, TensorRT neither), so everything here
settles them beforehand: of equals the lower index wins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gap_export.spec.manifest import Order

if TYPE_CHECKING:
    import torch


def rank_tokens(scores: torch.Tensor) -> torch.Tensor:
    """Place of each token when the best comes first, by comparing them pairwise.

    Args:
        scores: float [B, N], without NaN.

    Returns:
        int64 [B, N], in each row 0..N-1, each once.
    """
    import torch

    index = torch.arange(scores.shape[1], device=scores.device)
    mine, other = scores[:, :, None], scores[:, None, :]
    beaten = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return beaten.to(torch.int64).sum(dim=-1)


def take_smallest(priorities: torch.Tensor, *, num_kept_tokens: int, order: Order) -> torch.Tensor:
    """Indices of the K smallest priorities.

    Args:
        priorities: int64 [B, N], without repeats in a row.
        num_kept_tokens: K, 1..N.
        order: ``raster``: ascending indices; ``score``: the smallest priority first.

    Returns:
        int64 [B, K].
    """
    import torch

    taken = torch.topk(priorities, num_kept_tokens, dim=1, largest=False, sorted=True).indices
    return put_in_order(taken, order=order)


def put_in_order(chosen: torch.Tensor, *, order: Order) -> torch.Tensor:
    """Chosen indices int64 [B, K], ascending (``raster``) or as they are (``score``)."""
    import torch

    if order == "score":
        return chosen
    return torch.topk(chosen, chosen.shape[1], dim=1, largest=False, sorted=True).values


def select_tokens(scores: torch.Tensor, *, num_kept_tokens: int, order: Order) -> torch.Tensor:
    """Indices of the best K tokens; of equal scores the lower index wins.

    Args:
        scores: float [B, N], without NaN.
        num_kept_tokens: K, 1..N.
        order: ``raster``: ascending; ``score``: best first.

    Returns:
        int64 [B, K], unpruned index of each kept token.
    """
    return take_smallest(rank_tokens(scores), num_kept_tokens=num_kept_tokens, order=order)


def first_of_largest(values: torch.Tensor) -> torch.Tensor:
    """Index of the largest value along the last dimension, the lowest of equals: [..., N] -> [...].

    ArgMax would do but for ties, which TensorRT breaks as it likes.
    """
    import torch

    size = values.shape[-1]
    index = torch.arange(size, device=values.device)
    is_largest = values == values.amax(dim=-1, keepdim=True)
    return torch.where(is_largest, index, size).amin(dim=-1)


def mark_largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` largest along the last dimension, the lowest indices of equals.

    Args:
        values: float [..., N], finite.
        count: 0..N.

    Returns:
        bool [..., N], ``count`` of them true in each row.
    """
    import torch

    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    least = torch.topk(values, count, dim=-1).values.amin(dim=-1, keepdim=True)
    above, equal = values > least, values == least
    room = count - above.to(torch.int64).sum(dim=-1, keepdim=True)
    return above | (equal & (equal.to(torch.int64).cumsum(dim=-1) <= room))


def is_among(indices: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Which of N tokens are among ``indices`` int64 [B, K]: bool [B, N]."""
    import torch

    index = torch.arange(num_tokens, device=indices.device)
    return (indices[:, :, None] == index).to(torch.int64).sum(dim=1) > 0


def gather_tokens(features: torch.Tensor, keep_indices: torch.Tensor) -> torch.Tensor:
    """Rows of ``features`` [B, N, D] at ``keep_indices`` int64 [B, K]: [B, K, D].

    Written as one Gather over the flattened rows, which every runtime does fast.
    """
    import torch

    rows, num_tokens, width = features.shape
    first = torch.arange(rows, device=features.device) * num_tokens
    flat = (keep_indices + first[:, None]).reshape(-1)
    kept = features.reshape(rows * num_tokens, width).index_select(0, flat)
    return kept.reshape(rows, keep_indices.shape[1], width)
