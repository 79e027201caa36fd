"""Compare two arrays: arrays and tolerances in, a verdict out, and no idea where they are from."""

from __future__ import annotations

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


def _refuse(reason: str) -> Comparison:
    return Comparison(
        max_abs_diff=float("inf"), max_abs_reference=float("nan"), passed=False, reason=reason
    )
