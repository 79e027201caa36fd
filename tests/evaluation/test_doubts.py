"""What of an evaluation must not pass without a word."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gap_export.evaluation.doubts import find_doubts
from gap_export.spec.manifest import BoxSpec
from tests.evaluation.answers import ANGLED, WHOLE, record

THOUSAND = BoxSpec(syntax="bracketed", scale=1000.0, frame="image")
HUNDRED = BoxSpec(syntax="bracketed", scale=100.0, frame="image")
SIZE = (640, 480)
PIXELS, PERCENT, THOUSANDTHS, FRACTIONS = (640, 480), (100, 100), (1000, 1000), (1, 1)


def answers(spec, width, height, *, number=60, size=SIZE):
    """Boxes anywhere in 0..width by 0..height, two decimals where they are fractions."""
    rng = np.random.default_rng(0)
    texts = []
    for _ in range(number):
        x1, x2 = sorted(rng.uniform(0, width, 2))
        y1, y2 = sorted(rng.uniform(0, height, 2))
        digits = 2 if max(width, height) <= 1 else 0
        numbers = [f"{value:.{digits}f}" for value in (x1, y1, x2, y2)]
        texts.append(
            f"[{', '.join(numbers)}]"
            if spec.syntax == "bracketed"
            else "{" + "".join(f"<{number}>" for number in numbers) + "}"
        )
    return [record(text, spec, size) for text in texts]


@pytest.mark.parametrize(
    ("spec", "ends", "size", "guess"),
    [
        (WHOLE, PIXELS, SIZE, "look like pixels"),
        (WHOLE, PERCENT, SIZE, "look like percent (0..100)"),
        (WHOLE, THOUSANDTHS, SIZE, "look like 0..1000"),
        (WHOLE, (500, 375), (500, 375), "look like pixels"),
        (WHOLE, (4000, 3000), (4000, 3000), "look like pixels"),
        (WHOLE, (4000, 3000), SIZE, "do not run from 0 to 1"),
        (HUNDRED, THOUSANDTHS, SIZE, "look like 0..1000"),
        (HUNDRED, FRACTIONS, SIZE, "look like fractions (0..1)"),
        (THOUSAND, FRACTIONS, SIZE, "look like fractions (0..1)"),
        (THOUSAND, (4000, 3000), (4000, 3000), "look like pixels"),
        (ANGLED, PIXELS, SIZE, "look like pixels"),
        (ANGLED, THOUSANDTHS, SIZE, "look like 0..1000"),
    ],
)
def test_most_answers_out_of_scale_name_the_scale_they_fit(spec, ends, size, guess):
    (doubt,) = find_doubts(answers(spec, *ends, size=size), spec, accuracy=0.1)
    assert doubt.startswith("unpruned, out of scale: ")
    assert doubt.endswith(f" of 60; the answers {guess}: check the recipe's box.scale")


@pytest.mark.parametrize("spec", [WHOLE, HUNDRED, THOUSAND, ANGLED])
def test_answers_on_the_model_s_scale_are_no_doubt(spec):
    given = answers(spec, spec.scale, spec.scale)
    assert find_doubts(given, spec, accuracy=0.01) == ()


def test_half_of_the_answers_out_of_scale_is_no_doubt_and_more_is():
    right, wrong = answers(WHOLE, 1, 1, number=30), answers(WHOLE, *PIXELS, number=30)
    assert find_doubts([*right, *wrong], WHOLE, accuracy=0.4) == ()
    failed = replace(right[0], error="broken", fractions=None)
    (doubt,) = find_doubts([failed, *right[1:], *wrong], WHOLE, accuracy=0.4)
    assert "out of scale: 30 of 59" in doubt


def test_no_right_answer_is_a_doubt_whatever_the_scale():
    (doubt,) = find_doubts(answers(WHOLE, 1, 1), WHOLE, accuracy=0.0)
    assert "Acc@0.5 is 0.0 %: none of 60 answers is right" in doubt
    assert len(find_doubts(answers(WHOLE, *PIXELS), WHOLE, accuracy=0.0)) == 2
