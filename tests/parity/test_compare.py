"""The comparison helper must fail on what it must reject."""

from __future__ import annotations

import numpy as np
import pytest

from gap_export.parity.compare import compare_arrays, measure_differences, measure_selections

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


def test_differences_of_equal_arrays_are_none():
    found = measure_differences([(REFERENCE, REFERENCE.copy())] * 2)
    assert (found.max_abs_diff, found.mean_abs_diff, found.p99_abs_diff) == (0, 0, 0)
    assert (found.max_rel_diff, found.mean_rel_diff, found.p99_rel_diff) == (0, 0, 0)
    assert found.cosine == 1 and found.num_nonfinite == 0


def test_differences_are_those_of_all_pairs():
    ones = np.ones((2, 50), np.float32)
    far = ones.copy()
    far[1, 49] = 3
    found = measure_differences([(ones, ones), (ones * 2, far * 2)])
    assert found.max_abs_diff == 4
    assert found.mean_abs_diff == pytest.approx(4 / 200)
    # One of 200 is beyond the 99th percentile.
    assert found.p99_abs_diff == 0
    assert (found.max_rel_diff, found.mean_rel_diff) == (2, pytest.approx(2 / 200))
    assert found.cosine == pytest.approx(102 / np.sqrt(100 * 108))


def test_relative_differences_leave_zeros_out():
    found = measure_differences([(np.asarray([0.0, 2.0]), np.asarray([1.0, 3.0]))])
    assert (found.max_rel_diff, found.mean_rel_diff) == (0.5, 0.5)
    assert found.max_abs_diff == 1
    none = measure_differences([(np.zeros(3), np.ones(3))])
    assert none.max_rel_diff == 0 and none.cosine == 0


@pytest.mark.parametrize(
    ("candidate", "nonfinite"),
    [
        (np.where(REFERENCE > 2.9, np.nan, REFERENCE), 1),
        (REFERENCE[:1], 0),
        (np.full_like(REFERENCE, -np.inf), 24),
    ],
    ids=["nan", "shape", "inf"],
)
def test_differences_of_what_cannot_be_compared_are_infinite(candidate, nonfinite):
    found = measure_differences([(REFERENCE, REFERENCE), (REFERENCE, candidate)])
    assert found.max_abs_diff == found.mean_abs_diff == found.p99_rel_diff == np.inf
    assert np.isnan(found.cosine) and found.num_nonfinite == nonfinite


def test_differences_of_nothing_are_infinite():
    assert measure_differences([]).max_abs_diff == np.inf
    assert measure_selections([]).max_abs_diff == np.inf


def test_cosine_knows_direction_at_any_scale():
    tiny = np.asarray([3e-200, 4e-200])
    assert measure_differences([(tiny, tiny)]).cosine == 1
    assert measure_differences([(tiny, -tiny)]).cosine == -1
    assert measure_differences([(tiny, tiny * 1e300)]).cosine == pytest.approx(1)


def test_selections_are_counted_in_tokens():
    keep = np.arange(10, dtype=np.int64)[None]
    found = measure_selections([(keep, keep), (keep, keep[:, ::-1] + 1)])
    assert (found.max_abs_diff, found.mean_abs_diff, found.max_rel_diff) == (1, 0.5, 0.1)
    assert found.cosine == pytest.approx(0.9)
    assert measure_selections([(keep, keep[:, 1:])]).max_abs_diff == np.inf
