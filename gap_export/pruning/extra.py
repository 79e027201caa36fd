"""The extra token: what was dropped, in one token.

Shape letters: B rows, N visual tokens, K kept, D vision features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from gap_export.spec.manifest import ExtraPosition, GridSpec


class CanvasGrid(NamedTuple):
    """The grid of whichever of several canvases an image is on.

    Attributes:
        cols: int64 [1], its columns.
    """

    cols: torch.Tensor


def add_up_dropped(
    features: torch.Tensor, is_dropped: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """The extra token's features.

    Args:
        features: float [B, N, D].
        is_dropped: bool [B, N]; a row without any gives zeros.
        weights: float [B, N] for a weighted sum, as it is, over the dropped; None for their mean.

    Returns:
        float [B, 1, D].
    """
    if weights is None:
        dropped = is_dropped.to(torch.float32)
        weights = dropped / dropped.sum(dim=1, keepdim=True).clamp(min=1)
    else:
        weights = torch.where(is_dropped, weights, 0.0)
    return torch.matmul(weights[:, None, :].to(features.dtype), features)


def place_extra(
    is_dropped: torch.Tensor, position: ExtraPosition, grid: GridSpec | CanvasGrid
) -> torch.Tensor:
    """Where in the image the extra token is said to be.

    Args:
        is_dropped: bool [B, N].
        position: ``last``: the last visual token's place; ``centroid``: the row and the column in
            the middle of the dropped tokens, each rounded half up. Never a mean of the places
            themselves: that of two rows lies in the middle of a row.
        grid: Rows and columns of the N tokens.

    Returns:
        int64 [B, 1].
    """
    dropped = is_dropped.to(torch.int64)
    index = torch.arange(is_dropped.shape[1], device=is_dropped.device)
    if position == "last":
        return torch.where(dropped >= 0, index, 0).amax(dim=1, keepdim=True)
    count = dropped.sum(dim=1, keepdim=True).clamp(min=1)
    # In whole numbers, so that all runtimes round alike.
    row = (dropped * (index // grid.cols)).sum(dim=1, keepdim=True)
    col = (dropped * (index % grid.cols)).sum(dim=1, keepdim=True)
    middle_row, middle_col = (2 * row + count) // (2 * count), (2 * col + count) // (2 * count)
    return middle_row * grid.cols + middle_col
