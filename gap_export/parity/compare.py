"""Compare two arrays: arrays and tolerances in, a verdict out, and no idea where they are from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class Differences(NamedTuple):
    """What separates a candidate from its reference, over all arrays that were paired.

    Attributes:
        max_abs_diff: Largest |reference - candidate|.
        mean_abs_diff: Their mean.
        p99_abs_diff: Their 99th percentile.
        max_rel_diff: Largest |reference - candidate| / |reference| where |reference| is not 0.
        mean_rel_diff: Their mean.
        p99_rel_diff: Their 99th percentile.
        cosine: Cosine of two arrays as vectors, the smallest of all pairs.
        num_nonfinite: NaN and infinite elements of the candidates.
    """

    max_abs_diff: float
    mean_abs_diff: float
    p99_abs_diff: float
    max_rel_diff: float
    mean_rel_diff: float
    p99_rel_diff: float
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
        truth, judged = reference.astype(np.float64), candidate.astype(np.float64)
        num_nonfinite += int(judged.size - np.isfinite(judged).sum())
        if (
            truth.shape != judged.shape
            or truth.size == 0
            or not (np.isfinite(truth).all() and np.isfinite(judged).all())
        ):
            comparable = False
            continue
        difference, size = np.abs(truth - judged).ravel(), np.abs(truth).ravel()
        absolute.append(difference)
        relative.append(difference[size > 0] / size[size > 0])
        cosines.append(_cosine(truth.ravel(), judged.ravel()))
    if not (comparable and absolute):
        far = float("inf")
        return Differences(far, far, far, far, far, far, float("nan"), num_nonfinite)
    return Differences(
        *_summary(np.concatenate(absolute)),
        *_summary(np.concatenate(relative)),
        min(cosines),
        num_nonfinite,
    )


def measure_selections(pairs: Iterable[tuple[NDArray[Any], NDArray[Any]]]) -> Differences:
    """As :func:`measure_differences`, of kept tokens.

    Args:
        pairs: Twice int64 [I, K].

    Returns:
        Differences are numbers of changed tokens in a row, relative ones their fraction of the row,
        and the cosine is that of two selections as vectors of 0 and 1.
    """
    changed, lengths = [], []
    for reference, candidate in pairs:
        if reference.shape != candidate.shape or reference.ndim != 2 or reference.size == 0:
            return measure_differences([(reference, candidate)])
        for truth, judged in zip(reference, candidate, strict=True):
            changed.append(len(np.setdiff1d(truth, judged)))
            lengths.append(len(truth))
    if not changed:
        return measure_differences([])
    counts = np.asarray(changed, dtype=np.float64)
    fractions = counts / np.asarray(lengths)
    return Differences(*_summary(counts), *_summary(fractions), float(1 - fractions.max()), 0)


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
    reference: NDArray[Any], candidate: NDArray[Any], *, max_changed_fraction: float
) -> Comparison:
    """Which tokens were kept, where scores too close to tell apart may have decided.

    Args:
        reference: int64 [I, K], the truth.
        candidate: int64 [I, K], what is judged.
        max_changed_fraction: Fraction of a row's tokens that may have changed; one may always.

    Returns:
        ``max_abs_diff`` is the largest number of changed tokens in a row. A row that repeats a
        token, or that does not ascend where the truth does, fails.
    """
    if reference.shape != candidate.shape or reference.dtype != candidate.dtype:
        return _refuse(
            f"{candidate.dtype} {list(candidate.shape)} instead of "
            f"{reference.dtype} {list(reference.shape)}"
        )
    if reference.ndim != 2 or reference.size == 0:
        return _refuse("nothing to compare: no tokens")
    allowed = max(1, int(max_changed_fraction * reference.shape[1]))
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
        else f"{worst} of {reference.shape[1]} kept tokens have changed",
    )


def find_ties(
    reference: NDArray[Any],
    candidate: NDArray[Any],
    margins: NDArray[np.float32] | None,
    *,
    tie_margin: float,
    max_changed: int,
) -> NDArray[np.bool_]:
    """Which rows of kept tokens differ because of a rounding tie.

    Args:
        reference: int64 [B, K], the truth.
        candidate: What is judged.
        margins: float32 [B], by how much the reference's closest choice was decided; None where
            that is not known.
        tie_margin: What rounding can decide.
        max_changed: Tokens of a row that may have changed; 0 for none.

    Returns:
        bool [B]: the reference's own choice was a tie, and the candidate chose otherwise, in a way
        that holds together, and not too far off.
    """
    ties = np.zeros(len(reference), dtype=np.bool_)
    if (
        max_changed == 0
        or margins is None
        or margins.shape != ties.shape
        or reference.shape != candidate.shape
    ):
        return ties
    for row in np.flatnonzero(margins <= tie_margin):
        truth, judged = reference[row], candidate[row]
        if np.array_equal(truth, judged) or _fault_of_selection(truth, judged):
            continue
        ties[row] = len(np.setdiff1d(truth, judged)) <= max_changed
    return ties


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
    truth, judged = reference["image_features"], candidate["image_features"]
    kept, judged_kept = reference["keep_indices"], candidate["keep_indices"]
    if truth.shape != judged.shape or kept.shape != judged_kept.shape:
        return truth, judged
    pairs = []
    for row in range(len(kept)):
        _, here, there = np.intersect1d(kept[row], judged_kept[row], return_indices=True)
        pairs.append((truth[row, here], judged[row, there]))
    return np.concatenate([one for one, _ in pairs]), np.concatenate([one for _, one in pairs])


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


def largest_of(values: NDArray[Any]) -> float:
    """The largest absolute value; 0 without values.

    NaN and infinity, which fail any comparison, are left out: they must not widen its tolerance.
    """
    finite = np.abs(values[np.isfinite(values)].astype(np.float64))
    return float(finite.max(initial=0.0))


def _refuse(reason: str) -> Comparison:
    return Comparison(
        max_abs_diff=float("inf"), max_abs_reference=float("nan"), passed=False, reason=reason
    )
