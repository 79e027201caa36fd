"""Weights that the stored ones come to on a canvas, for images that stand still."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gap_export.checkpoint.weights import DerivedWeight, Weight


def summed_frames(patches: Weight) -> Weight:
    """A projection of patches of several frames, as one of patches of a single frame.

    The frames of an image are all the same, so their weights add up.

    Args:
        patches: [D, 3, frames, p, p].

    Returns:
        [D, 3, p, p], of the same dtype.
    """
    width, channels, frames, *patch = patches.shape
    return DerivedWeight(
        dtype=patches.dtype,
        shape=(width, channels, *patch),
        sources=(patches,),
        compute=lambda stored: stored.float().sum(dim=2),
        origin=f"{patches.origin}, its {frames} frames added",
    )


def interpolated_table(table: Weight, grid: tuple[int, int]) -> Weight:
    """A square table of learned positions for another grid, bilinear, corners on corners.

    Args:
        table: [G * G, D].
        grid: R and C, rows and columns of patches.

    Returns:
        [R * C, D] in raster order, of the same dtype.
    """
    (number, width), (rows, cols) = table.shape, grid
    side = int(number**0.5)
    if (rows, cols) == (side, side):
        return table

    def compute(stored: torch.Tensor) -> torch.Tensor:
        plane = stored.float().reshape(side, side, width)
        upper, lower, down = _neighbors(rows, side)
        left, right, across = _neighbors(cols, side)
        bent = torch.lerp(plane[upper], plane[lower], down[:, None, None])
        return torch.lerp(bent[:, left], bent[:, right], across[None, :, None]).flatten(0, 1)

    return DerivedWeight(
        dtype=table.dtype,
        shape=(rows * cols, width),
        sources=(table,),
        compute=compute,
        origin=f"{table.origin}, from {side}x{side} to {rows}x{cols} patches",
    )


def picked(table: Weight, rows: torch.Tensor) -> Weight:
    """Rows of a table, int64 [P] of them, in another order."""
    return DerivedWeight(
        dtype=table.dtype,
        shape=(len(rows), *table.shape[1:]),
        sources=(table,),
        compute=lambda stored: stored[rows],
        origin=table.origin,
    )


def stacked(tables: Sequence[Weight]) -> Weight:
    """Tables of as many rows one behind the other."""
    rows, *rest = tables[0].shape
    return DerivedWeight(
        dtype=tables[0].dtype,
        shape=(rows * len(tables), *rest),
        sources=tuple(tables),
        compute=lambda *stored: torch.cat(stored),
        origin=", then ".join(table.origin for table in tables),
    )


def _neighbors(count: int, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each of ``count`` places the two nearest of ``side``, and the weight of the second."""
    places = torch.arange(count, dtype=torch.float32) * (side - 1) / max(count - 1, 1)
    first = places.floor()
    second = (first + 1).clamp(max=side - 1)
    return first.long(), second.long(), places - first
