"""Comparisons by output: selections that rounding may decide, and those it may not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gap_export.parity.compare import compare_selections, pair_features
from gap_export.parity.replay import Call
from gap_export.parity.tally import Tally
from gap_export.spec.tolerances import TOLERANCES

KEEP = np.arange(0, 200, 2, dtype=np.int64)[None]
RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(1, 100, 8)).astype(np.float16) * 4


def with_others(number: int) -> np.ndarray:
    """KEEP with its last tokens replaced by their neighbours."""
    keep = KEEP.copy()
    keep[0, len(KEEP[0]) - number :] += 1
    return keep


@pytest.mark.parametrize(("number", "passed"), [(0, True), (1, True), (2, True), (3, False)])
def test_a_few_other_tokens_pass_and_more_fail(number, passed):
    found = compare_selections(KEEP, with_others(number), max_changed_fraction=0.02)
    assert found.passed is passed
    assert found.max_abs_diff == number
    assert bool(found.reason) is not passed


def test_one_other_token_passes_however_few_there_are():
    assert compare_selections(
        KEEP[:, :5], KEEP[:, :5] + [[0, 0, 0, 0, 1]], max_changed_fraction=0.02
    ).passed
    assert not compare_selections(
        KEEP[:, :5], KEEP[:, :5] + [[0, 0, 0, 1, 1]], max_changed_fraction=0.02
    ).passed


@pytest.mark.parametrize(
    ("candidate", "words"),
    [
        (KEEP[:, ::-1], "raster order"),
        (KEEP[:, :-1], "instead of"),
        (KEEP.astype(np.int32), "instead of"),
        (KEEP + 1, "100 kept tokens"),
        (np.zeros_like(KEEP), "twice"),
    ],
    ids=["order", "fewer", "dtype", "shifted", "repeated"],
)
def test_wrong_selection_fails_with_a_reason(candidate, words):
    found = compare_selections(KEEP, candidate, max_changed_fraction=0.02)
    assert not found.passed
    assert words in found.reason


def test_score_order_may_differ_where_the_reference_has_it():
    best_first = KEEP[:, ::-1]
    swapped = best_first.copy()
    swapped[0, [3, 4]] = swapped[0, [4, 3]]
    assert compare_selections(best_first, swapped, max_changed_fraction=0.02).passed


def test_features_are_paired_by_token():
    other = with_others(2)
    order = RNG.permutation(100)
    mine, theirs = pair_features(
        {"image_features": FEATURES, "keep_indices": KEEP},
        {"image_features": FEATURES[:, order], "keep_indices": other[:, order]},
    )
    assert mine.shape == (98, 8)
    assert (mine == theirs).all()


def judge(
    dtype: str,
    *,
    keep: np.ndarray = KEEP,
    features: np.ndarray = FEATURES,
    newline: float = 1.0,
    calls: int = 1,
) -> dict[str, Any]:
    tally = Tally()
    expected = {"image_features": FEATURES, "keep_indices": KEEP}
    given = {"image_features": features, "keep_indices": keep}
    truth = {"image_newline": np.ones(8, np.float16)}
    for _ in range(calls):
        tally.add(
            [
                Call(component="vision_encoder", inputs={}, outputs=expected),
                Call(component="newline", inputs={}, outputs=truth),
            ],
            [given, {"image_newline": np.full(8, newline, np.float16)}],
        )
    return {row.tensor: row for row in tally.rows(TOLERANCES[dtype])}


def test_half_precision_is_judged_by_the_size_of_the_output():
    largest = float(np.abs(FEATURES).max())
    noisy = FEATURES + np.float16(0.004 * largest)
    rows = judge("float16", features=noisy)
    assert rows["image_features"].passed
    assert rows["image_features"].atol == pytest.approx(18 / 2048 * largest)
    assert not judge("float16", features=FEATURES + np.float16(0.02 * largest))[
        "image_features"
    ].passed
    assert not judge("float32", features=noisy)["image_features"].passed


@pytest.mark.parametrize(
    "spoil",
    [
        lambda f: f * 2,
        lambda f: f[:, ::-1],
        lambda f: np.where(f > 4, np.float16("nan"), f),
        np.zeros_like,
        lambda f: f[:, :, :-1],
    ],
    ids=["doubled", "permuted", "nan", "zeros", "narrower"],
)
def test_wrong_features_fail_in_half_precision(spoil):
    rows = judge("float16", features=spoil(FEATURES))
    assert not rows["image_features"].passed
    assert rows["keep_indices"].passed


def test_another_token_passes_in_half_precision_and_never_in_single():
    for dtype, passed in (("float16", True), ("float32", False)):
        row = judge(dtype, keep=with_others(1), calls=3)["keep_indices"]
        assert row.passed is passed
        assert row.calls == 3


def test_newline_must_be_the_same():
    for dtype in ("float16", "float32"):
        assert judge(dtype)["image_newline"].passed
        row = judge(dtype, newline=1.001)["image_newline"]
        assert not row.passed
        assert row.component == "newline"


def test_every_tolerance_says_why():
    for outputs in TOLERANCES.values():
        assert all(tolerance.why for tolerance in outputs.values())
    rows = judge("float16")
    assert rows["keep_indices"].why == TOLERANCES["float16"]["keep_indices"].why


def test_rows_sum_up_all_calls():
    row = judge("float32", features=FEATURES + np.float16(0.5), calls=2)["image_features"]
    assert row.calls == 2
    assert row.mean_abs_diff == pytest.approx(0.5, rel=1e-2)
    assert row.p99_abs_diff <= row.max_abs_diff < 0.51
    assert 0.9 < row.cosine < 1 and row.num_nonfinite == 0


def test_other_tokens_are_counted_and_not_their_indices_subtracted():
    row = judge("float16", keep=with_others(2))["keep_indices"]
    assert (row.max_abs_diff, row.max_rel_diff) == (2, 0.02)
    assert row.cosine == pytest.approx(0.98)


def test_a_selection_that_does_not_hold_together_is_infinitely_far_off():
    row = judge("float16", keep=KEEP[:, ::-1])["keep_indices"]
    assert not row.passed and row.max_abs_diff == np.inf


def test_nonfinite_values_are_counted_and_leave_no_figures():
    spoilt = FEATURES.copy()
    spoilt[0, 0, :3] = np.nan, np.inf, -np.inf
    row = judge("float16", features=spoilt)["image_features"]
    assert row.num_nonfinite == 3
    assert row.max_abs_diff == row.p99_rel_diff == np.inf and np.isnan(row.cosine)


def test_the_first_failing_call_of_each_component_is_found():
    tally = Tally()
    calls = [
        Call(component="vision_encoder", inputs={}, outputs={"keep_indices": KEEP}),
        Call(component="new_cache", inputs={}, outputs={}),
        Call(component="decoder_model_merged", inputs={}, outputs={"logits": FEATURES[0]}),
        Call(component="decoder_model_merged", inputs={}, outputs={"logits": FEATURES[0]}),
    ]
    outputs = [dict(call.outputs) for call in calls]
    tolerances = TOLERANCES["float32"]
    tally.add(calls, outputs)
    assert tally.first_failures(tolerances) == {}
    outputs[3]["logits"] = outputs[3]["logits"] * 2
    tally.add(calls, outputs)
    found = tally.first_failures(tolerances)
    assert found.keys() == {"decoder_model_merged"}
    assert found["decoder_model_merged"].call is calls[3]
    assert found["decoder_model_merged"].calls is calls


def test_every_dtype_has_a_tolerance_for_every_output():
    names = {frozenset(outputs) for outputs in TOLERANCES.values()}
    assert len(names) == 1
    for outputs in TOLERANCES.values():
        for name in ("inputs_embeds", "image_newline"):
            assert (outputs[name].atol, outputs[name].rtol, outputs[name].largest_fraction) == (
                0,
                0,
                0,
            )


def judge_choices(
    margins: list[float] | None, keep: np.ndarray, features: np.ndarray | None = None
) -> dict[str, Any]:
    """Two images, of which the reference kept KEEP, in float32."""
    truth = np.repeat(KEEP, 2, axis=0)
    vectors = np.repeat(FEATURES, 2, axis=0)
    call = Call(
        component="vision_encoder",
        inputs={},
        outputs={"image_features": vectors, "keep_indices": truth},
        margins=None if margins is None else np.asarray(margins, np.float32),
    )
    tally = Tally()
    given = {"image_features": vectors if features is None else features, "keep_indices": keep}
    tally.add([call], [given])
    tolerances = TOLERANCES["float32"]
    rows = {row.tensor: row for row in tally.rows(tolerances)}
    assert bool(tally.first_failures(tolerances)) is not all(row.passed for row in rows.values())
    return rows


def test_other_tokens_pass_where_rounding_decided_the_choice_of_that_image():
    other = np.concatenate([with_others(12), KEEP])
    features = np.repeat(FEATURES, 2, axis=0).copy()
    features[0, -12:] = 99
    row = judge_choices([1e-7, 1.0], other, features)
    assert row["keep_indices"].passed and row["image_features"].passed
    assert row["keep_indices"].ties == 1 and row["image_features"].ties == 0
    for margins in ([1.0, 1e-7], [1e-5, 1e-5], [1e-7], None):
        row = judge_choices(margins, other, features)
        assert not row["keep_indices"].passed and row["keep_indices"].ties == 0
    # Nothing differs: nothing is left out.
    same = judge_choices([1e-7, 1e-7], np.repeat(KEEP, 2, axis=0))["keep_indices"]
    assert same.passed and same.ties == 0


def test_an_open_choice_excuses_neither_nonsense_nor_features():
    twice = np.repeat(KEEP, 2, axis=0)
    twice[0, 1] = twice[0, 0]
    assert not judge_choices([1e-7, 1.0], twice)["keep_indices"].passed
    turned = np.concatenate([KEEP[:, ::-1], KEEP])
    assert not judge_choices([1e-7, 1.0], turned)["keep_indices"].passed
    other = np.concatenate([with_others(12), KEEP])
    wrong = np.repeat(FEATURES, 2, axis=0) + np.float16(1)
    row = judge_choices([1e-7, 1.0], other, wrong)
    assert row["keep_indices"].passed and not row["image_features"].passed


def test_an_open_choice_excuses_a_share_of_the_tokens_and_no_more():
    for number, passed in ((12, True), (13, False), (100, False)):
        other = np.concatenate([with_others(number), KEEP])
        row = judge_choices([0.0, 1.0], other)["keep_indices"]
        assert row.passed is passed and row.ties == int(passed)


def test_in_half_precision_no_margin_excuses_anything():
    """Some choice is close in every image there: whatever was kept would pass."""
    tally = Tally()
    truth = {"image_features": FEATURES, "keep_indices": KEEP}
    close = np.zeros(1, np.float32)
    call = Call(component="vision_encoder", inputs={}, outputs=truth, margins=close)
    tally.add([call], [{**truth, "keep_indices": with_others(3)}])
    rows = {row.tensor: row for row in tally.rows(TOLERANCES["float16"])}
    assert not rows["keep_indices"].passed and rows["keep_indices"].ties == 0
