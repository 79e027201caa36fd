"""Compare two arrays: arrays and tolerances in, a verdict out, and no idea where they are from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


@dataclass(frozen=True, kw_only=True)
class Differences:
    """What separates a candidate from its reference, over all arrays that were paired.

    Attributes:
        max_abs: Largest |reference - candidate|.
        mean_abs: Their mean.
        p99_abs: Their 99th percentile.
        max_rel: Largest |reference - candidate| / |reference| where |reference| is not 0.
        mean_rel: Their mean.
        p99_rel: Their 99th percentile.
        cosine: Of two arrays as vectors, the smallest of all pairs.
        num_nonfinite: NaN and infinite elements of the candidates.
    """

    max_abs: float
    mean_abs: float
    p99_abs: float
    max_rel: float
    mean_rel: float
    p99_rel: float
    cosine: float
    num_nonfinite: int


def measure_differences(pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> Differences:
    """Sum up how far candidates are from their references.

    Args:
        pairs: Reference and candidate, of any shape. Where one pair cannot be compared (other
            shapes, nothing in it, NaN or infinity on either side), the differences of all are
            infinite, and there is no cosine.
    """
    absolute: list[NDArray[np.float64]] = []
    relative: list[NDArray[np.float64]] = []
    cosines: list[float] = []
    num_nonfinite, comparable = 0, True
    for reference, candidate in pairs:
        judged = candidate.astype(np.float64)
        truth = reference.astype(np.float64)
        num_nonfinite += int(judged.size - np.isfinite(judged).sum())
        if truth.shape != judged.shape or truth.size == 0:
            comparable = False
            continue
        if not (np.isfinite(truth).all() and np.isfinite(judged).all()):
            comparable = False
            continue
        difference = np.abs(truth - judged).ravel()
        size = np.abs(truth).ravel()
        absolute.append(difference)
        relative.append(difference[size > 0] / size[size > 0])
        cosines.append(_cosine(truth.ravel(), judged.ravel()))
    far = float("inf")
    whole = comparable and bool(absolute)
    of_abs = _summary(np.concatenate(absolute)) if whole else (far, far, far)
    of_rel = _summary(np.concatenate(relative)) if whole else (far, far, far)
    return Differences(
        max_abs=of_abs[0],
        mean_abs=of_abs[1],
        p99_abs=of_abs[2],
        max_rel=of_rel[0],
        mean_rel=of_rel[1],
        p99_rel=of_rel[2],
        cosine=min(cosines) if whole else float("nan"),
        num_nonfinite=num_nonfinite,
    )


def measure_selections(pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> Differences:
    """As :func:`measure_differences`, of kept tokens.

    Args:
        pairs: Twice int64 [I, K].

    Returns:
        Differences are numbers of other tokens in a row, relative ones their share of the row, and
        the cosine is that of two selections as vectors of 0 and 1.
    """
    counts: list[int] = []
    lengths: list[int] = []
    for reference, candidate in pairs:
        if reference.shape != candidate.shape or reference.ndim != 2 or reference.size == 0:
            return measure_differences([(reference, candidate)])
        for truth, judged in zip(reference, candidate, strict=True):
            counts.append(len(np.setdiff1d(truth, judged)))
            lengths.append(len(truth))
    if not counts:
        return measure_differences([])
    others = np.asarray(counts, dtype=np.float64)
    shares = others / np.asarray(lengths)
    of_abs, of_rel = _summary(others), _summary(shares)
    return Differences(
        max_abs=of_abs[0],
        mean_abs=of_abs[1],
        p99_abs=of_abs[2],
        max_rel=of_rel[0],
        mean_rel=of_rel[1],
        p99_rel=of_rel[2],
        cosine=float(1 - shares.max()),
        num_nonfinite=0,
    )


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
        fault = _fault_of_selection(truth, judged)
        if fault:
            return _refuse(fault)
        worst = max(worst, len(np.setdiff1d(truth, judged)))
    return Comparison(
        max_abs_diff=float(worst),
        max_abs_reference=float(np.abs(reference).max()),
        passed=worst <= allowed,
        reason=""
        if worst <= allowed
        else f"{worst} of {reference.shape[1]} kept tokens are others",
    )


def find_excused(
    reference: NDArray[Any],
    candidate: NDArray[Any],
    margins: NDArray[np.float32] | None,
    *,
    margin: float,
    most: int,
) -> NDArray[np.bool_]:
    """Which rows of kept tokens are others because rounding decided.

    Args:
        reference: int64 [B, K], the truth.
        candidate: What is judged.
        margins: float32 [B], by how much the reference's closest choice was decided; None where
            that is not known.
        margin: What rounding can decide.
        most: Tokens of a row that may be others; 0 for none.

    Returns:
        bool [B]: the reference's own choice hung on rounding, and the candidate chose otherwise, in
        a way that holds together, and not too far off.
    """
    excused = np.zeros(len(reference), dtype=np.bool_)
    if (
        most == 0
        or margins is None
        or margins.shape != excused.shape
        or reference.shape != candidate.shape
    ):
        return excused
    for row in np.flatnonzero(margins <= margin):
        truth, judged = reference[row], candidate[row]
        if np.array_equal(truth, judged) or _fault_of_selection(truth, judged):
            continue
        excused[row] = len(np.setdiff1d(truth, judged)) <= most
    return excused


def _fault_of_selection(truth: NDArray[Any], judged: NDArray[Any]) -> str:
    """Why a row of kept tokens does not hold together, whichever they are; empty if it does."""
    if len(np.unique(judged)) != len(judged):
        return "a token is kept twice"
    if (np.diff(truth) > 0).all() and not (np.diff(judged) > 0).all():
        return "the kept tokens are not in raster order"
    return ""


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


def _summary(values: NDArray[np.float64]) -> tuple[float, float, float]:
    """Largest, mean and 99th percentile; 0 where there are no values."""
    if values.size == 0:
        return 0.0, 0.0, 0.0
    return float(values.max()), float(values.mean()), float(np.percentile(values, 99))


def _cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    if np.array_equal(one, other):
        return 1.0
    # By their largest first: squares of large values overflow, and those of small ones vanish.
    sizes = [float(np.abs(values).max()) for values in (one, other)]
    if min(sizes) == 0:
        return float(sizes[0] == sizes[1])
    one, other = one / sizes[0], other / sizes[1]
    product = float(one @ other) / float(np.linalg.norm(one) * np.linalg.norm(other))
    return min(1.0, max(-1.0, product))


def _refuse(reason: str) -> Comparison:
    return Comparison(
        max_abs_diff=float("inf"), max_abs_reference=float("nan"), passed=False, reason=reason
    )
