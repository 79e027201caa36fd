"""Where visual tokens are, and which of them pruners keep that do not look at the image, in numpy.

Shape letters: N visual tokens before pruning, K kept.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gap_export.spec.architecture import DecoderShape
from gap_export.spec.manifest import GridSpec
from gap_export.spec.positions import VisualSpan, unpruned_ids


def token_places(grid: GridSpec) -> NDArray[np.int64]:
    """Row and column of each token: int64 [N, 2]."""
    index = np.arange(grid.num_visual_tokens, dtype=np.int64)
    return np.stack(np.divmod(index, grid.cols), axis=1)


def rope_sums(grid: GridSpec, decoder: DecoderShape) -> NDArray[np.float32]:
    """How near RoPE's rotation of a token is to none, and to a quarter turn (arXiv 2602.03060).

    V = sum over frequencies of cos(m theta), and U, the same of sin. The paper's m is a token's id
    in a prompt. Here ids count from the image's first token, of a tiled image from each tile's: a
    vision encoder does not know what stands before the image, and by RoPE only differences count.

    Args:
        grid: Of the N tokens of an image or tile.
        decoder: Whose RoPE; with M-RoPE each frequency turns by the id of its own axis.

    Returns:
        float32 [N, 2], V and U of each token.
    """
    number = grid.num_visual_tokens
    span = VisualSpan(
        start=0,
        num_visual_tokens=number,
        keep_indices=np.arange(number),
        grid=(grid.rows, grid.cols),
    )
    ids = unpruned_ids(number, [span], position_axes=decoder.position_axes)
    powers = np.arange(decoder.num_frequencies) / decoder.num_frequencies
    angles = ids[list(decoder.frequency_axes())].T * decoder.rope_theta**-powers
    sums = np.stack([np.cos(angles).sum(axis=1), np.sin(angles).sum(axis=1)], axis=1)
    return sums.astype(np.float32)


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
