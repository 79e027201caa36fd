"""Where two answers part, and whether rounding explains it."""

from __future__ import annotations

import numpy as np
import pytest

from gap_export.errors import GapExportError
from gap_export.parity.levels.answers import AnswerPair
from gap_export.parity.question import Question
from gap_export.parity.replay import Call
from gap_export.spec.tolerances import TOLERANCES
from tests.parity.levels.pairs import EOS, answer, pair


def test_margin_is_that_of_the_step_where_the_two_part():
    logits = [[5.0, 1.0, 0.0], [1.0, 0.0, 3.5]]
    found = pair(answer((0, EOS)), answer((0, 0, EOS)), logits)
    assert found.first_other_step == 2
    assert found.margin == 2.5
    assert not found.is_tie


def test_half_precision_margin_grows_with_the_logits():
    logits = [np.asarray([40.0, 39.5, 0.0], np.float16)]
    half = pair(answer((0, EOS)), answer((1, EOS)), logits, dtype="float16")
    assert half.margin == 0.5
    assert half.is_tie
    assert not pair(answer((0, EOS)), answer((1, EOS)), logits).is_tie
    assert not pair(answer((0, EOS)), answer((2, EOS)), logits, dtype="float16").is_tie


@pytest.mark.parametrize(
    ("chosen", "other"), [(1, 0), (1, 2)], ids=["the preferred one", "a third one"]
)
def test_a_token_that_the_logits_do_not_prefer_is_no_tie(chosen, other):
    """Whoever changes a recorded token makes the margin negative, or one to some other token."""
    logits = [np.asarray([9.0, 8.0, 8.0 - 1e-6], np.float64)]
    found = pair(answer((chosen, EOS)), answer((other, EOS)), logits)
    assert found.margin < 1e-4 and not found.is_tie


def test_equal_answers_are_no_tie():
    logits = [np.asarray([1.0, 1.0, 0.0])]
    found = pair(answer(), answer(), logits)
    assert found.same_tokens and found.margin is None and not found.is_tie


@pytest.mark.parametrize("turned", [False, True])
def test_an_answer_that_ends_where_the_other_goes_on_is_no_tie(turned):
    sides = [answer((0,)), answer((0, EOS))]
    found = pair(*(reversed(sides) if turned else sides), [[1.0, 1.0, 1.0]] * 2)
    assert found.first_other_step == 2
    assert found.margin is None and not found.is_tie and not found.same_tokens


def test_a_candidate_without_an_answer_differs_from_the_first_token_on():
    found = pair(answer(), GapExportError("no answer"), [[1.0, 1.0, 1.0]])
    assert (found.first_other_step, found.margin, found.box) == (1, None, None)
    assert not (found.same_tokens or found.same_box or found.is_tie)


@pytest.mark.parametrize(
    ("dtype", "keep", "is_tie"),
    [
        ("float16", (0, 4), True),
        ("float32", (0, 4), False),
        ("float16", (5, 4), False),
        ("float16", (3, 0), False),
        ("float16", (0, 3), False),
    ],
    ids=["one other", "none in float32", "too many others", "another order", "the same"],
)
def test_another_selection_is_a_tie_only_where_it_may_be_another(dtype, keep, is_tie):
    logits = [[9.0, 1.0, 0.0]]
    assert pair(answer(), answer((1, EOS), keep), logits, dtype=dtype).is_tie is is_tie


def test_any_other_selection_is_a_tie_where_rounding_decided_it():
    logits = np.asarray([9.0, 1.0, 0.0])
    for margins, is_tie in (([1e-7], True), ([1.0, 1e-7], True), ([1e-5], False), (None, False)):
        seen = Call(
            component="vision_encoder",
            inputs={},
            outputs={},
            margins=None if margins is None else np.asarray(margins, np.float32),
        )
        calls = [
            seen,
            Call(component="decoder_model_merged", inputs={}, outputs={"logits": logits[None]}),
        ]
        for keep, differs in (((0, 4), True), ((5, 4), False), ((0, 3), False)):
            found = AnswerPair.of_calls(
                Question(image=np.zeros((96, 96, 3), np.uint8), expression="the dog"),
                answer(),
                answer((1, EOS), keep),
                calls,
                TOLERANCES["float32"],
            )
            assert found.is_tie is (is_tie and differs)


def test_another_selection_with_the_same_answer_needs_no_excuse():
    assert not pair(answer(), answer(keep=(0, 4)), dtype="float16").is_tie
