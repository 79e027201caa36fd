"""The comparison helper must fail on what it must reject."""

from __future__ import annotations

import numpy as np
import pytest

from gap_export.parity.compare import compare_arrays

REFERENCE = np.linspace(-3, 3, 24, dtype=np.float32).reshape(2, 3, 4)


def compare(candidate, atol=1e-4, rtol=1e-4, reference=REFERENCE):
    return compare_arrays(reference, candidate, atol=atol, rtol=rtol)


def test_equal_arrays_pass_and_report_zero():
    result = compare(REFERENCE.copy())
    assert result.passed
    assert result.max_abs_diff == 0
    assert result.max_abs_reference == 3


def test_difference_within_tolerance_passes_and_beyond_fails():
    assert compare(REFERENCE + np.float32(5e-5)).passed
    assert not compare(REFERENCE + np.float32(1e-3)).passed


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (REFERENCE * 2, "beyond tolerance"),
        (REFERENCE.transpose(0, 2, 1), "shape"),
        (REFERENCE[:, ::-1], "beyond tolerance"),
        (np.where(REFERENCE > 2.9, np.nan, REFERENCE), "NaN"),
        (np.where(REFERENCE > 2.9, np.inf, REFERENCE), "infinity"),
        (REFERENCE.astype(np.int64), "dtype"),
        (np.zeros_like(REFERENCE), "beyond tolerance"),
    ],
    ids=["doubled", "axes swapped", "axis reversed", "nan", "inf", "integers", "zeros"],
)
def test_wrong_candidates_fail_with_a_reason(candidate, words):
    result = compare(candidate)
    assert not result.passed
    assert words in result.reason


def test_nan_in_the_reference_fails_even_when_both_agree():
    bad = np.full_like(REFERENCE, np.nan)
    assert not compare(bad, reference=bad).passed


def test_empty_arrays_fail():
    empty = np.zeros((0, 3), np.float32)
    result = compare(empty, reference=empty)
    assert not result.passed
    assert "empty" in result.reason


def test_one_element_off_among_many_fails_and_is_located():
    candidate = REFERENCE.copy()
    candidate[1, 2, 3] += 1
    result = compare(candidate)
    assert not result.passed
    assert "(1, 2, 3)" in result.reason


def test_integers_must_be_equal():
    truth = np.arange(5)
    assert compare(truth.copy(), atol=0, rtol=0, reference=truth).passed
    assert not compare(truth + 1, atol=0, rtol=0, reference=truth).passed
