"""How many of an image's tokens are kept where that is left to the image.

LLaVA-PruMerge (arXiv 2403.15388) and TRIM (arXiv 2409.10994) keep the tokens whose scores are
outliers by Tukey's rule. Both take the quartiles over a whole batch; here each image, and each
expression, has its own, so that an answer does not depend on what else is asked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.spec.manifest import PruningSpec
from gap_export.spec.positions import Int64Array

_WHISKER = 1.5


def count_outliers(token_scores: NDArray[np.floating[Any]]) -> Int64Array:
    """How many scores of each row lie above Q3 + 1.5 (Q3 - Q1).

    The count itself, and not N times the share, whose rounding loses one now and then.

    Args:
        token_scores: [B, N].

    Returns:
        int64 [B], 0 or more.
    """
    scores = token_scores.astype(np.float64)
    first, third = np.percentile(scores, [25, 75], axis=1)
    bar = third + _WHISKER * (third - first)
    found: Int64Array = (scores > bar[:, None]).sum(axis=1, dtype=np.int64)
    return found


def settle_numbers(standing_out: Int64Array, pruning: PruningSpec) -> Int64Array:
    """How many tokens are kept of each row: as many as stand out, at least one, K at most.

    Bundles that name buckets were made to round that number up to one of them, and still do.

    Args:
        standing_out: int64 [B], from :func:`count_outliers`.
        pruning: The bundle's.

    Returns:
        int64 [B].
    """
    numbers = np.clip(standing_out, 1, pruning.num_kept_tokens)
    if not pruning.kept_buckets:
        return numbers
    ends = np.asarray(pruning.kept_buckets, dtype=np.int64)
    return ends[np.searchsorted(ends, numbers, side="left")]
