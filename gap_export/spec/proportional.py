"""As how many tokens each kept visual token counts in proportional attention.

Attention divides its weight among all tokens. Where most visual tokens are dropped, what is left of
the image has less of it than the whole image had, and the text has more. Proportional attention
(Token Merging, arXiv 2210.09461) lets each token count as often as there were tokens for it: the
log of that number is added to its scores, which is what feeding it so often would do. No position
changes.
"""

from __future__ import annotations

import numpy as np

from gap_export.spec.positions import Int64Array


def spread_counts(num_visual_tokens: int, num_kept_tokens: int) -> Int64Array:
    """Whole numbers as equal as can be that add up to the unpruned number.

    Args:
        num_visual_tokens: N, at least K.
        num_kept_tokens: K, at least 1.

    Returns:
        int64 [K], each N/K rounded up or down; token k counts ``floor((k + 1) N / K) -
        floor(k N / K)``, so that larger ones are spread evenly.
    """
    ends = np.arange(num_kept_tokens + 1, dtype=np.int64) * num_visual_tokens // num_kept_tokens
    return np.diff(ends)
