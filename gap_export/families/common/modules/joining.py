"""Neighboring patches joined to one visual token.

Shape letters: I images, R rows and C columns of patches, J patches to a token, N = R * C / J
tokens.
"""

from __future__ import annotations

import torch


def join_patches(
    per_patch: torch.Tensor, grid: tuple[int, int], joined: tuple[int, int]
) -> torch.Tensor:
    """Group what belongs to the patches of one token.

    Args:
        per_patch: [I, R * C, ...], patches in raster order.
        grid: R and C.
        joined: Rows and columns of patches in one token; they divide the grid.

    Returns:
        [I, N, J, ...], tokens in raster order, the patches of each row by row.
    """
    images, _, *rest = per_patch.shape
    (rows, cols), (down, across) = grid, joined
    assert rows % down == 0 and cols % across == 0, (grid, joined)
    num_tokens = rows * cols // (down * across)
    if down > 1:
        blocks = (images, rows // down, down, cols // across, across, *rest)
        per_patch = per_patch.reshape(blocks).transpose(2, 3)
    return per_patch.reshape(images, num_tokens, down * across, *rest)
