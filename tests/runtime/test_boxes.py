"""Answers to boxes, against the forward direction: box -> padded square -> text."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from gap_export.runtime.answers import is_out_of_scale
from gap_export.runtime.boxes import ParsedBox, parse_answer, parse_box, to_pixels
from gap_export.runtime.images.geometry import Frame, ImageGeometry
from gap_export.spec.manifest import BoxSpec

PADDED = BoxSpec(syntax="bracketed", scale=1.0, frame="padded_square")
ANGLED = BoxSpec(syntax="angled", scale=100.0, frame="image")
SQUASHED = BoxSpec(syntax="bracketed", scale=100.0, frame="image")
SPECS = pytest.mark.parametrize("spec", [PADDED, SQUASHED])

sizes = st.integers(1, 5000)
hundredths = st.integers(0, 100)


@SPECS
@given(
    st.tuples(hundredths, hundredths, hundredths, hundredths),
    st.sampled_from(["", " ", "\n", "  "]),
    st.sampled_from(["", "Sure, it is at ", "the cup [1] is here: ", "["]),
    st.sampled_from(["", ".", "]", " and [0.1, 0.2, 0.3, 0.4]"]),
)
def test_written_box_is_read_back(spec, corners, space, before, after):
    numbers = [f"{corner / 100 * spec.scale:.2f}" for corner in corners]
    text = f"{before}[{space}{f'{space},{space}'.join(numbers)}{space}]{after}"
    box = parse_box(text, spec)
    assert box is not None
    assert box == pytest.approx([corner / 100 for corner in corners], abs=1e-9)


@SPECS
@given(sizes, sizes, st.data())
def test_pixels_undo_the_padding_of_wide_tall_and_square_images(spec, width, height, data):
    x1 = data.draw(st.integers(0, width - 1))
    y1 = data.draw(st.integers(0, height - 1))
    x2 = data.draw(st.integers(x1 + 1, width))
    y2 = data.draw(st.integers(y1 + 1, height))
    # Forward, as an image is prepared: pasted into the middle of a square, or stretched.
    if spec.frame == "padded_square":
        side = max(width, height)
        shift_x, shift_y, span_x, span_y = (side - width) // 2, (side - height) // 2, side, side
    else:
        shift_x, shift_y, span_x, span_y = 0, 0, width, height
    fractions = (
        (x1 + shift_x) / span_x,
        (y1 + shift_y) / span_y,
        (x2 + shift_x) / span_x,
        (y2 + shift_y) / span_y,
    )
    geometry = ImageGeometry(width=width, height=height)
    assert to_pixels(fractions, spec, geometry) == pytest.approx((x1, y1, x2, y2), abs=1e-6)
    swapped = (fractions[2], fractions[3], fractions[0], fractions[1])
    assert to_pixels(swapped, spec, geometry) == to_pixels(fractions, spec, geometry)
    crossed = (fractions[2], fractions[1], fractions[0], fractions[3])
    assert to_pixels(crossed, spec, geometry) == to_pixels(fractions, spec, geometry)


@SPECS
@given(sizes, sizes, st.lists(st.floats(-1e9, 1e9), min_size=4, max_size=4))
def test_pixels_are_within_the_image_and_ordered_or_none(spec, width, height, values):
    x1, y1, x2, y2 = values
    box = to_pixels((x1, y1, x2, y2), spec, ImageGeometry(width=width, height=height))
    if box is not None:
        assert 0 <= box[0] < box[2] <= width
        assert 0 <= box[1] < box[3] <= height


@pytest.mark.parametrize(
    ("fractions", "expected"),
    [
        ((0.25, 0.5, 0.75, 0.6), (100.0, 100.0, 300.0, 140.0)),  # side 400, 100 rows of padding
        ((0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 400.0, 200.0)),  # clipped to the image
        ((0.1, 0.0, 0.2, 0.25), None),  # all of it in the padding above
        ((0.5, 0.5, 0.5, 0.6), None),  # no width
        ((0.5, 0.5, 0.6, 0.5), None),  # no height
        ((-2.0, 0.5, -1.0, 0.6), None),  # left of the image
    ],
)
def test_pixels_of_a_wide_image_at_known_points(fractions, expected):
    box = to_pixels(fractions, PADDED, ImageGeometry(width=400, height=200))
    assert box == (None if expected is None else pytest.approx(expected))


NO_BOX = {
    PADDED: [
        "", "no box", "[]", "[0.1, 0.2, 0.3]", "[0.1, 0.2, 0.3, 0.4, 0.5]", "[0.1 0.2 0.3 0.4]",
        "[a, b, c, d]", "[0.1, 0.2, 0.3, 0.4", "(0.1, 0.2, 0.3, 0.4)", "[nan, inf, 0.3, 0.4]",
        "[1e3, 0.2, 0.3, 0.4]", "[., 0.2, 0.3, 0.4]", "[0.1,, 0.2, 0.3, 0.4]",
        "[" + "9" * 400 + ", 0, 0, 0]",
        "[\u0661, 0.2, 0.3, 0.4]",  # a digit, but not one of the syntax
    ],
    ANGLED: [
        "", "{}", "{<1><2><3>}", "{<1><2><3><4><5>}", "{<1>,<2>,<3>,<4>}", "<1><2><3><4>",
        "{<1.5><2><3><4>}", "{<-1><2><3><4>}", "{<a><b><c><d>}", "{<1><2><3><4>",
        "[0.1, 0.2, 0.3, 0.4]", "{<" + "9" * 400 + "><2><3><4>}", "{<\u0661><2><3><4>}",
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "spec"), [(text, spec) for spec, texts in NO_BOX.items() for text in texts]
)
def test_text_without_a_box_in_the_syntax_gives_none(text, spec):
    assert parse_box(text, spec) is None


@given(
    st.tuples(*[st.integers(0, 100)] * 4),
    st.sampled_from(["", " ", "\n", "  "]),
    st.sampled_from(["", "<unk>", "the cup {1} <2> ", "{<1><2><3>", "{"]),
    st.sampled_from(["", "</s>", "}", "<delim>{<1><2><3><4>}"]),
)
def test_angled_box_is_read_back(corners, space, before, after):
    numbers = space.join(f"<{space}{corner}{space}>" for corner in corners)
    box = parse_box(f"{before}{{{space}{numbers}{space}}}{after}", ANGLED)
    assert box == pytest.approx([corner / 100 for corner in corners], abs=1e-9)


def test_shikra_s_answer_is_bracketed():
    assert parse_box("Answer: [0.123,0.456,0.7,0.9] .", PADDED) == (0.123, 0.456, 0.7, 0.9)


def test_first_of_several_boxes_counts():
    assert parse_box("[0.1, 0.2, 0.3, 0.4] [0.5, 0.6, 0.7, 0.8]", PADDED) == (0.1, 0.2, 0.3, 0.4)


def test_signs_and_bare_points_are_numbers():
    assert parse_box("[-0.1, +.5, 1., 1]", PADDED) == (-0.1, 0.5, 1.0, 1.0)


@given(sizes, sizes)
def test_padded_square_covers_the_image_with_equal_margins(width, height):
    assume(width != height)
    frame = ImageGeometry(width=width, height=height).box_frame(PADDED)
    assert frame.width == frame.height == max(width, height)
    for start, span in ((frame.left, width), (frame.top, height)):
        before, after = -start, frame.width + start - span
        assert 0 <= after - before <= 1


def test_squashed_image_is_its_own_frame():
    geometry = ImageGeometry(width=30, height=20)
    spec = dataclasses.replace(SQUASHED, scale=1.0)
    assert geometry.box_frame(spec) == Frame(left=0, top=0, width=30, height=20)


CORNERS = BoxSpec(syntax="corners", scale=1000.0, frame="image")
PIXELS = BoxSpec(syntax="bracketed", scale=(640.0, 480.0), frame="image")


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("(100,200),(300,400)", True),
        ("<|box_start|>(100,200),(300,400)<|box_end|>", True),
        ("<|object_ref_start|>the cup (1)<|object_ref_end|><|box_start|>(100, 200), "
         "(300, 400)<|box_end|>", True),
        ("the cup: (100,200) (300,400)", False),
        ("[100, 200], [300, 400]", False),
        ("[100 200][300 400]", False),
        ("[100, 200, 300, 400]", False),
    ],
)  # fmt: skip
def test_corners_are_read_with_and_without_special_tokens(text, exact):
    found = parse_answer(text, CORNERS)
    assert found is not None and found.fractions == (0.1, 0.2, 0.3, 0.4) and found.exact == exact
    assert text[slice(*found.span)].replace(" ", "") == "(100,200),(300,400)" if exact else text
    assert (parse_box(text, CORNERS) is not None) == exact


@pytest.mark.parametrize("text", ["(100,200)", "(100,200),(300)", "(1,2,3),(4,5,6)", "100,200,300"])
def test_what_is_no_pair_of_corners_is_no_box(text):
    assert parse_answer(text, CORNERS) is None


def test_reading_corners_takes_time_linear_in_the_length():
    long = "(" + " " * 200_000 + "1" + "(1,2) " * 50_000 + "[" * 100_000
    assert parse_answer(long, CORNERS) is not None


def test_pixels_of_the_resized_image_have_a_scale_for_each_axis():
    text = '```json\n[\n\t{"bbox_2d": [64, 48, 320, 480], "label": "the cup"}\n]\n```'
    found = parse_answer(text, PIXELS)
    span = text.index("[64"), text.index(', "label')
    assert found == ParsedBox(fractions=(0.1, 0.1, 0.5, 1.0), exact=True, span=span)
    # The user's image is twice as wide and as high as it was.
    geometry = ImageGeometry(width=1280, height=960)
    assert to_pixels(found.fractions, PIXELS, geometry) == (128, 96, 640, 960)
    assert is_out_of_scale((0.5, 0.5, 1.2, 0.9), PIXELS)
    assert is_out_of_scale((0.1 / 640, 0.2 / 480, 0.9 / 640, 1 / 480), PIXELS)
    assert not is_out_of_scale(found.fractions, PIXELS)
    assert PIXELS.describe_ends() == "to 640 in x and 480 in y"
