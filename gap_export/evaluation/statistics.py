"""How far measured accuracies can be trusted. Numpy alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

# Clusters drawn at once: 16 MB, for any number of resamples.
_MAX_DRAWN = 2_000_000


def bootstrap_interval(
    values: NDArray[np.float64],
    clusters: Sequence[str],
    *,
    seed: int,
    num_resamples: int = 2000,
) -> tuple[float, float]:
    """95 % interval of a mean: percentile bootstrap over clusters.

    Questions about one image are not independent, so images are drawn, each with all its questions,
    with replacement and as many as there are (Davison and Hinkley 1997, "Bootstrap Methods and
    their Application", 3.8). The mean is over the questions drawn.

    numpy keeps the raw stream of PCG64 the same in all versions (NEP 19), which it does not promise
    for what ``Generator`` draws from it; so a seed means the same interval everywhere, whatever the
    order of the questions.

    Args:
        values: float64 [N], one for each question.
        clusters: N names; questions of one cluster share theirs.
        seed: 0..2**63 - 1.
        num_resamples: At least 1.

    Returns:
        Within the smallest and largest value. It has no width where all clusters have one mean:
        of what has not happened a bootstrap knows nothing.

    Raises:
        ValueError: there are no values, they are not finite or not as many as the clusters, or
            there are no resamples.
    """
    if len(values) != len(clusters) or len(values) == 0 or num_resamples < 1:
        raise ValueError(
            f"{len(values)} values of {len(clusters)} clusters, {num_resamples} resamples"
        )
    if not np.isfinite(values).all():
        raise ValueError("values that are not finite have no mean")
    # Sorted by cluster, then value: sums do not depend on the order of the questions.
    # Not as an array of text: every name would take the room of the longest.
    places = {name: place for place, name in enumerate(sorted(set(clusters)))}
    members = np.array([places[name] for name in clusters], dtype=np.int64)
    order = np.lexsort((values, members))
    sums = np.bincount(members[order], weights=values[order])
    counts = np.bincount(members)
    num_clusters = len(counts)
    stream = np.random.PCG64(seed)
    block = max(1, _MAX_DRAWN // num_clusters)
    means = []
    for start in range(0, num_resamples, block):
        num_rows = min(block, num_resamples - start)
        # The remainder favors no cluster by more than one in 2**64 / C.
        drawn = stream.random_raw(num_rows * num_clusters) % num_clusters
        drawn = drawn.reshape(num_rows, num_clusters)
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def draw_clusters(
    clusters: Sequence[str], *, seed: int, num_resamples: int = 1000
) -> Iterator[NDArray[np.float64]]:
    """How often each value is in each resample of a bootstrap over clusters, in blocks.

    Args:
        clusters: As of :func:`bootstrap_interval`, and likewise the rest.
        seed: See :func:`bootstrap_interval`.
        num_resamples: In all.

    Yields:
        float64 [R, N]: some resamples.
    """
    places = {name: place for place, name in enumerate(sorted(set(clusters)))}
    members = np.array([places[name] for name in clusters], dtype=np.int64)
    count = len(places)
    stream = np.random.PCG64(seed)
    block = max(1, _MAX_DRAWN // len(members))
    for start in range(0, num_resamples, block):
        size = min(block, num_resamples - start)
        drawn = (stream.random_raw(size * count) % count).astype(np.int64)
        places_drawn = np.repeat(np.arange(size), count) * count + drawn
        times = np.bincount(places_drawn, minlength=size * count).reshape(size, count)
        yield times[:, members].astype(np.float64)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of McNemar's test (1947): do two settings hit equally often?

    If they do, each question that only one of them hits is a fair coin toss, so the smaller number
    is binomial; the p-value is twice its lower tail, at most 1. Questions about one image are
    treated as independent, so it is a little small.

    Args:
        only_first: Questions that the first alone hits.
        only_second: Those that the second alone does.

    Returns:
        In 0..1; 1 where there are no such questions. Very small ones come out as 0.

    Raises:
        ValueError: a number is negative.
    """
    fewer, total = min(only_first, only_second), only_first + only_second
    if fewer < 0:
        raise ValueError(f"{only_first} and {only_second} are no counts")
    # The largest term by its logarithm, the others as multiples of it: no power of two underflows.
    log_largest = math.lgamma(total + 1) - math.lgamma(fewer + 1) - math.lgamma(total - fewer + 1)
    term = tail = 1.0
    for count in range(fewer, 0, -1):
        term *= count / (total - count + 1)
        tail += term
        if term < 1e-17 * tail:
            break
    return min(1.0, 2.0 * tail * math.exp(log_largest - total * math.log(2.0)))
