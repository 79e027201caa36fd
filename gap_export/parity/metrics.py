"""The task metric: intersection over union, Acc@0.5 and intervals. Numpy alone."""

from __future__ import annotations

import math

import numpy as np

Box = tuple[float, float, float, float]


def intersection_over_union(first: Box, second: Box) -> float:
    """Plain IoU of two boxes (x1, y1, x2, y2) in the same units; 0 where either has no area.

    No "+1 pixel": coordinates are edges, not pixel indices.
    """
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    overlap = width * height
    areas = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (first, second))
    return float(overlap / (areas - overlap))


def accuracy_at(ious: list[float], threshold: float = 0.5) -> float:
    """Share of IoUs above the threshold, in 0..1; an answer that did not parse counts with IoU 0.

    Raises:
        ValueError: there are no IoUs: an accuracy of nothing means nothing.
    """
    if not ious:
        raise ValueError("accuracy of no samples")
    return float(np.mean(np.asarray(ious) > threshold))


def wilson_interval(successes: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion (Wilson 1927), in 0..1.

    Questions about one image are treated as independent, so it is a little narrow.

    Raises:
        ValueError: total < 1 or successes not in 0..total.
    """
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"{successes} of {total} is not a proportion")
    share = successes / total
    denominator = 1 + z * z / total
    center = (share + z * z / (2 * total)) / denominator
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / denominator
    return max(0.0, center - half), min(1.0, center + half)


def paired_difference_interval(
    both: int, only_first: int, only_second: int, neither: int
) -> tuple[float, float]:
    """95 % interval of first share - second share, of the same questions asked of two.

    Method 10 of Newcombe 1998, "Improved confidence intervals for the difference between binomial
    proportions based on paired data", Statistics in Medicine 17:2635-2650: the Wilson intervals of
    the two shares, put together with the correlation of the two, which is corrected for continuity.

    Args:
        both: Questions that both answered rightly.
        only_first: Those that the first alone did.
        only_second: Those that the second alone did.
        neither: Those that none did.

    Returns:
        Within -1..1. Questions about one image are treated as independent, so it is a little
        narrow.

    Raises:
        ValueError: there are no questions, or a number is negative.
    """
    counts = (both, only_first, only_second, neither)
    total = sum(counts)
    if total < 1 or min(counts) < 0:
        raise ValueError(f"{counts} are no counts of pairs")
    hits = (both + only_first, both + only_second)
    (low, high), (other_low, other_high) = (wilson_interval(n, total) for n in hits)
    share, other = (n / total for n in hits)
    phi = _correlation(*counts)
    below, above = share - low, high - share
    other_below, other_above = other - other_low, other_high - other
    down = math.sqrt(below**2 - 2 * phi * below * other_above + other_above**2)
    up = math.sqrt(above**2 - 2 * phi * above * other_below + other_below**2)
    difference = (only_first - only_second) / total
    return max(-1.0, difference - down), min(1.0, difference + up)


def _correlation(both: int, only_first: int, only_second: int, neither: int) -> float:
    """Phi of a two by two table, corrected for continuity; 0 where a row or column is empty."""
    spread = (
        (both + only_first)
        * (only_second + neither)
        * (both + only_second)
        * (only_first + neither)
    )
    if spread == 0:
        return 0.0
    excess = float(both * neither - only_first * only_second)
    if excess > 0:
        excess = max(0.0, excess - (both + only_first + only_second + neither) / 2)
    return excess / math.sqrt(spread)
