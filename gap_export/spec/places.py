"""Which visual tokens pruners keep that do not look at the image, in plain numpy.

Shape letters: N visual tokens before pruning, K kept.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gap_export.spec.manifest import GridSpec


def lattice_places(grid: GridSpec, *, num_kept_tokens: int) -> NDArray[np.int64]:
    """``spatial``: exactly K places, r rows, K spread evenly over them, columns evenly in a row.

    r is sqrt(K * rows / cols), rounded half up and kept to what K needs and the grid has. Row u of
    r lies at the middle of the u-th of r equal bands of the grid, columns likewise.

    Args:
        grid: The grid of the visual tokens.
        num_kept_tokens: K, 1..N.

    Returns:
        int64 [K] of 0..N-1, ascending.
    """
    wanted = math.floor(math.sqrt(num_kept_tokens * grid.rows / grid.cols) + 0.5)
    fewest = -(-num_kept_tokens // grid.cols)
    num_rows = min(max(wanted, fewest), grid.rows, num_kept_tokens)
    places: list[int] = []
    for band in range(num_rows):
        row = _middle(band, num_rows, grid.rows)
        start, end = (n * num_kept_tokens // num_rows for n in (band, band + 1))
        count = end - start
        places += [row * grid.cols + _middle(n, count, grid.cols) for n in range(count)]
    return np.array(places, dtype=np.int64)


def drawn_places(num_visual_tokens: int, *, num_kept_tokens: int, seed: int) -> NDArray[np.int64]:
    """``random``: K places without replacement, in the order drawn.

    Each place gets a raw 64-bit number and the K smallest win. numpy keeps the raw stream of PCG64
    the same in all versions (NEP 19), which it does not promise for ``Generator.choice``; so a seed
    means the same places everywhere, and a larger K only adds places.

    Args:
        num_visual_tokens: N.
        num_kept_tokens: K, 1..N.
        seed: 0..2**63 - 1.

    Returns:
        int64 [K] of 0..N-1.
    """
    lots = np.random.PCG64(seed).random_raw(num_visual_tokens)
    return np.argsort(lots, kind="stable")[:num_kept_tokens].astype(np.int64)


def _middle(band: int, num_bands: int, length: int) -> int:
    """Cell at the middle of one of ``num_bands`` equal bands of ``length`` cells."""
    return (2 * band + 1) * length // (2 * num_bands)
