"""Compare two arrays: arrays and tolerances in, a verdict out, and no idea where they are from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How far a candidate is from its reference.

    Attributes:
        max_abs_diff: Largest |reference - candidate|; infinite where they cannot be compared.
        max_abs_reference: Largest |reference|, to judge the difference by.
        passed: Whether |reference - candidate| <= atol + rtol * |reference| everywhere.
        reason: Why not, in words; empty where it passed.
    """

    max_abs_diff: float
    max_abs_reference: float
    passed: bool
    reason: str


def compare_arrays(
    reference: NDArray[Any], candidate: NDArray[Any], *, atol: float, rtol: float
) -> Comparison:
    """Elementwise comparison; integers and booleans must be equal when atol = rtol = 0.

    Args:
        reference: The truth, any shape.
        candidate: What is judged; must have the same shape and kind (float, integer).
        atol: Absolute tolerance, in the arrays' units.
        rtol: Relative to |reference|.

    Returns:
        Never an exception for bad data: other shapes or kinds, empty arrays, NaN or infinity on
        either side fail, with the reason.
    """
    if reference.shape != candidate.shape:
        return _refuse(f"shape {list(candidate.shape)} instead of {list(reference.shape)}")
    if reference.dtype.kind != candidate.dtype.kind:
        return _refuse(f"dtype {candidate.dtype} instead of {reference.dtype}")
    if reference.size == 0:
        return _refuse("nothing to compare: the arrays are empty")
    truth = reference.astype(np.float64)
    judged = candidate.astype(np.float64)
    for name, values in (("reference", truth), ("candidate", judged)):
        if not np.isfinite(values).all():
            return _refuse(f"the {name} holds NaN or infinity")
    difference = np.abs(truth - judged)
    bad = difference > atol + rtol * np.abs(truth)
    reason = ""
    if bad.any():
        where = tuple(int(i) for i in np.unravel_index(int(difference.argmax()), bad.shape))
        reason = f"{int(bad.sum())} of {bad.size} elements beyond tolerance, worst at {where}"
    return Comparison(
        max_abs_diff=float(difference.max()),
        max_abs_reference=float(np.abs(truth).max()),
        passed=not reason,
        reason=reason,
    )


def compare_selections(
    reference: NDArray[Any], candidate: NDArray[Any], *, others: float
) -> Comparison:
    """Which tokens were kept, where scores too close to tell apart may have decided.

    Args:
        reference: int64 [I, K], the truth.
        candidate: int64 [I, K], what is judged.
        others: Share of each row's tokens that may be others; at least one may.

    Returns:
        ``max_abs_diff`` is the largest number of other tokens in a row. A row that repeats a token,
        or that does not ascend where the truth does, fails.
    """
    if reference.shape != candidate.shape or reference.dtype != candidate.dtype:
        return _refuse(
            f"{candidate.dtype} {list(candidate.shape)} instead of "
            f"{reference.dtype} {list(reference.shape)}"
        )
    if reference.ndim != 2 or reference.size == 0:
        return _refuse("nothing to compare: no tokens")
    allowed = max(1, int(others * reference.shape[1]))
    worst = 0
    for truth, judged in zip(reference, candidate, strict=True):
        if len(np.unique(judged)) != len(judged):
            return _refuse("a token is kept twice")
        if (np.diff(truth) > 0).all() and not (np.diff(judged) > 0).all():
            return _refuse("the kept tokens are not in raster order")
        worst = max(worst, len(np.setdiff1d(truth, judged)))
    return Comparison(
        max_abs_diff=float(worst),
        max_abs_reference=float(np.abs(reference).max()),
        passed=worst <= allowed,
        reason=""
        if worst <= allowed
        else f"{worst} of {reference.shape[1]} kept tokens are others",
    )


def pair_features(
    reference: Mapping[str, NDArray[Any]], candidate: Mapping[str, NDArray[Any]]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Features of the tokens that both sides kept, pairwise.

    Args:
        reference: ``image_features`` [I, K, H] and ``keep_indices`` [I, K].
        candidate: Likewise.

    Returns:
        Twice [n, H]; where the shapes do not fit, both sides' features as they are.
    """
    features, others = reference["image_features"], candidate["image_features"]
    keep, other_keep = reference["keep_indices"], candidate["keep_indices"]
    if features.shape != others.shape or keep.shape != other_keep.shape:
        return features, others
    mine, theirs = [], []
    for row in range(len(keep)):
        _, here, there = np.intersect1d(keep[row], other_keep[row], return_indices=True)
        mine.append(features[row, here])
        theirs.append(others[row, there])
    return np.concatenate(mine), np.concatenate(theirs)


def _refuse(reason: str) -> Comparison:
    return Comparison(
        max_abs_diff=float("inf"), max_abs_reference=float("nan"), passed=False, reason=reason
    )
