"""Boxes that are not written as the model should: what is read all the same, and what is not."""

from __future__ import annotations

import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.runtime.answers import read_answer
from gap_export.runtime.boxes import ParsedBox, parse_answer, parse_box
from gap_export.runtime.images.geometry import ImageGeometry
from gap_export.spec.manifest import BoxSpec

PADDED = BoxSpec(syntax="bracketed", scale=1.0, frame="padded_square")
ANGLED = BoxSpec(syntax="angled", scale=100.0, frame="image")
SQUASHED = BoxSpec(syntax="bracketed", scale=100.0, frame="image")


MEANT = {
    PADDED: [
        "[0.1, 0.2, 0.3, 0.4", "[0.1, 0.2, 0.3, 0.4,",  # cut off
        "It is at [0.1, 0.2, 0.3, 0.4.", "[0.1, 0.2, 0.3, 0.4, on the left",
        "[0.1, 0.2, 0.3, 0.4</s>", "0.1, 0.2, 0.3, 0.4]", "Answer: 0.1, 0.2, 0.3, 0.4] .",
        "(0.1, 0.2, 0.3, 0.4)", "{0.1, 0.2, 0.3, 0.4}", "[0.1, 0.2, 0.3, 0.4)",
        "[0.1 0.2 0.3 0.4]", "[0.1; 0.2; 0.3; 0.4]", "[0.1, 0.2; 0.3, 0.4]",
        "[0.1, 0.2, 0.3, 0.4,]", "[10%, 20%, 30%, 40%]", "[ 10 %,20 % , 30%  40 % ]",
        "[10%, 20%, 30%, 40%", "[.1, .2, .3, .4000000000000000000001", "[+0.1, 0.2, 0.3, 0.4",
        "the 3 cups (1, 2, 3) are at (0.1, 0.2, 0.3, 0.4), not at (0.5, 0.6, 0.7, 0.8)",
        "[0.1, 0.2, 0.3, 0.4 (5 cups)", "[0.1,\u00a00.2,\u00a00.3,\u00a00.4]",
    ],
    ANGLED: [
        "{<10><20><30><40>", "<10><20><30><40>}", "<10> <20> <30> <40>",
        "< 10 >, < 20 >, < 30 >, < 40 >", "<p>the cup</p> {<10>,<20>,<30>,<40>}",
        "<1> cup at <10><20><30><40> and <50><60><70><80>",
        "{<10><20><30><40><delim><50><60><70>", "[<10><20><30><40>]",
    ],
}  # fmt: skip
NOT_MEANT = {
    PADDED: [
        "", "in 3 of 5 of 2 of 1 cases",
        "0.1, 0.2, 0.3, 0.4",  # no bracket
        "(0.1, 0.2, 0.3, 0.4", "in this order: 3, 5, 2, 1)",  # one alone must be the model's
        "[0.1 0.2 0.3 0.4", "0.1; 0.2; 0.3; 0.4]",  # and needs commas
        "[0.1, 0.2, 0.3", "[0.1, 0.2, 0.3, 0.4, 0.5]", "[0.1, 0.2, 0.3, 0.4, 0.5",
        "[0.1, 0.2, 0.3, 0.4 0.5", "0.0, 0.1, 0.2, 0.3, 0.4]", "[0.1,, 0.2, 0.3, 0.4]",
        "[, 0.1, 0.2, 0.3, 0.4]", "[0.1, 0.2, 0.3, 0.4,,]", "[10%, 20%, 30%, 40]",
        "[10%%, 20%, 30%, 40%]", "[nan, inf, 0.3, 0.4", "[1e3, 0.2, 0.3, 0.4",
        "[0.1, 0.2, 0.3, 0.4e1", "[0.1, 0.2, 0.3, 0.4.5]", "[0.1, 0.2, 0.3, 0.4..",
        "[0.1-0.2-0.3-0.4]", "[., 0.2, 0.3, 0.4", "(a1, 2, 3, 4)", "[(0.1, 0.2), (0.3, 0.4)]",
        "<1><2><3><4>", "[" + "9" * 400 + ", 0, 0, 0", "[\u0661, 0.2, 0.3, 0.4",
    ],
    ANGLED: [
        "<10><20><30>", "<10><20><30><40><50>", "{<10><20>{<30><40>", "<10><20> to <30><40>",
        "<10.5><20><30><40>", "<-1><20><30><40>", "[0.1, 0.2, 0.3, 0.4]", "{10, 20, 30, 40}",
        "<" + "9" * 400 + "><2><3><4>",
    ],
}  # fmt: skip


def each(texts):
    rows = [(text, spec) for spec, of_spec in texts.items() for text in of_spec]
    return pytest.mark.parametrize(("text", "spec"), rows)


@each(MEANT)
def test_box_that_is_meant_is_read_with_tolerance(text, spec):
    found = parse_answer(text, spec)
    assert found is not None and not found.exact
    assert found.fractions == pytest.approx((0.1, 0.2, 0.3, 0.4), abs=1e-12)


@each(NOT_MEANT)
def test_what_is_no_box_is_not_made_one(text, spec):
    assert parse_answer(text, spec) is None


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("(0.5, 0.6, 0.7, 0.8) or rather [0.1, 0.2, 0.3, 0.4]", PADDED),
        ("[0.5, 0.6, 0.7, 0.8 [0.1, 0.2, 0.3, 0.4]", PADDED),
        ("<50><60><70><80> {<10><20><30><40>}", ANGLED),
    ],
)
def test_box_in_the_model_s_syntax_goes_before_one_that_is_meant(text, spec):
    span = text.index("{<" if spec is ANGLED else "[0.1"), len(text)
    box = (0.1, 0.2, 0.3, 0.4)
    assert parse_answer(text, spec) == ParsedBox(fractions=box, exact=True, span=span)


def test_session_answers_a_tolerated_box_with_a_warning():
    geometry = ImageGeometry(width=100, height=100)
    manifest: Any = SimpleNamespace(box=PADDED, decoder=SimpleNamespace(eos_token_ids=(2,)))

    def read(text: str) -> Any:
        return read_answer(text, (2,), manifest, geometry)

    exact = read("[0.1, 0.2, 0.3, 0.4]")
    meant, (warning,) = read("(0.1, 0.2, 0.3, 0.4)")
    assert exact == (meant, ()) and meant
    assert "read with tolerance: '(0.1, 0.2, 0.3, 0.4)'" in warning
    outside, (reason,) = read("(1.02, 1.02, 1.04, 1.04)")
    assert not outside and reason.startswith("the answer lies outside the image")


def test_percent_is_of_the_frame_whatever_the_scale():
    for spec in (PADDED, SQUASHED):
        found = parse_answer("[10%, 20%, 30%, 40%]", spec)
        assert found is not None and found.fractions == pytest.approx((0.1, 0.2, 0.3, 0.4))


def test_reversed_corners_stay_as_given():
    found = parse_answer("(0.7, 0.8, 0.1, 0.2)", PADDED)
    assert found is not None and found.fractions == (0.7, 0.8, 0.1, 0.2)


words = st.text(alphabet="abc <>/.:'\n", max_size=20)


@settings(deadline=None)
@given(
    st.tuples(*[st.integers(-50, 150)] * 4),
    words,
    words,
    st.sampled_from([",", ", ", " , ", ";", " ; ", " ", "\n"]),
    st.sampled_from(["[]", "()", "{}", "[)", "(]"]),
    st.sampled_from(["", "%", " %"]),
)
def test_box_in_a_sentence_is_read_back(corners, before, after, separator, brackets, percent):
    written = [f"{corner}{percent}" if percent else f"{corner / 100:.2f}" for corner in corners]
    found = parse_answer(
        f"{before}{brackets[0]}{separator.join(written)}{brackets[1]}{after}", PADDED
    )
    assert found is not None
    assert found.fractions == pytest.approx([corner / 100 for corner in corners], abs=1e-12)
    in_syntax = brackets == "[]" and not percent and "," in separator
    assert found.exact == in_syntax


@settings(deadline=None)
@given(
    st.tuples(*[st.integers(0, 100)] * 4),
    st.text(alphabet="abc {}/.:'\n", max_size=20),
    st.text(alphabet="abc {}/.:'\n", max_size=20),
    st.sampled_from(["", " ", ", "]),
)
def test_angled_box_in_a_sentence_is_read_back(corners, before, after, separator):
    numbers = separator.join(f"<{corner}>" for corner in corners)
    found = parse_answer(before + numbers + after, ANGLED)
    assert found is not None
    assert found.fractions == pytest.approx([corner / 100 for corner in corners], abs=1e-12)


@pytest.mark.parametrize("spec", [PADDED, ANGLED], ids=["bracketed", "angled"])
@settings(deadline=None)
@given(
    st.one_of(
        st.text(alphabet="[](){}<>0123456789.,;%+-e \n\u00a0", max_size=300),
        st.text(max_size=100),
        st.lists(
            st.sampled_from(["[", "]", "<1>", "{", "0.5", ",", " ", "%", ".", "1e9", "nan", "a"]),
            max_size=60,
        ).map("".join),
    )
)
def test_any_text_gives_a_finite_box_or_none(spec, text):
    found = parse_answer(text, spec)
    exact = parse_box(text, spec)
    if found is None:
        assert exact is None
        return
    assert all(math.isfinite(value) for value in found.fractions)
    assert exact == (found.fractions if found.exact else None)
    assert sum(character.isdigit() for character in text) >= 4


@pytest.mark.parametrize("spec", [PADDED, ANGLED], ids=["bracketed", "angled"])
@pytest.mark.parametrize(
    "piece",
    ["[", "{", "1", "1,", " ", "[1,2,3,", "[1 2 3 4 5]", "<1> ", "{<1><2><3>", "<1><2><3>{"],
)
def test_parsing_takes_linear_time(spec, piece):
    text = piece * (1_000_000 // len(piece))
    began = time.process_time()
    assert parse_answer(text, spec) is None
    # Below a second; a quadratic search would take hours.
    assert time.process_time() - began < 10
