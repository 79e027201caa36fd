"""What every list of kept visual tokens has to hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import GapExportError


def check_keep_indices(
    keep_indices: NDArray[Any],
    *,
    num_visual_tokens: int,
    num_kept_tokens: int,
    ascending: bool,
    error: type[GapExportError],
    who: str,
) -> None:
    """Refuse kept tokens that are not K different tokens, in raster order where that is promised.

    Args:
        keep_indices: [K'], kept tokens first; an extra token behind them is not looked at.
        num_visual_tokens: N.
        num_kept_tokens: K.
        ascending: Whether raster order is promised.
        error: The error that is raised.
        who: What gave them, for the message.

    Raises:
        GapExportError: ``error``: too few, out of range, repeated, or not ascending.
    """
    keep = np.asarray(keep_indices)[:num_kept_tokens]
    wrong = None
    if keep.ndim != 1 or keep.size != num_kept_tokens or keep.dtype.kind not in "iu":
        wrong = f"{keep.dtype} of shape {list(keep.shape)}"
    elif keep.min() < 0 or keep.max() >= num_visual_tokens:
        wrong = f"{keep.min()}..{keep.max()}"
    elif np.unique(keep).size != keep.size:
        values, counts = np.unique(keep, return_counts=True)
        wrong = f"{values[counts > 1][0]} more than once"
    elif ascending and (np.diff(keep) < 0).any():
        place = int(np.flatnonzero(np.diff(keep) < 0)[0])
        wrong = f"{keep[place]} before {keep[place + 1]}"
    if wrong is not None:
        raise error(
            f"{who} does not keep what it should",
            seen=wrong,
            allowed=f"{num_kept_tokens} different tokens of 0..{num_visual_tokens - 1}"
            + (", ascending" if ascending else ""),
        )
