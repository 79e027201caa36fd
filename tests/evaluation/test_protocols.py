"""The conventions of IoU, by examples worked out by hand."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.errors import UsageError
from gap_export.evaluation.protocols import PROTOCOLS, applicable, resolve_protocol
from gap_export.evaluation.records import Record
from gap_export.manifest import BoxSpec
from tests.evaluation.answers import ANGLED, PADDED, WHOLE, question, record

OURS, LMMS, SHIKRA, MINIGPT, VLM = PROTOCOLS.values()
EVERY = pytest.mark.parametrize("name", list(PROTOCOLS))


def iou(name: str, text: str, box, spec: BoxSpec = PADDED, size=(640, 480)) -> float:
    return PROTOCOLS[name].iou(record(text, spec, size), question(box, size), spec)


def test_protocols_are_those_of_the_fact_sheet_in_order():
    assert list(PROTOCOLS) == ["unpad", "lmms", "shikra", "minigpt-v2", "vlm-evaluation"]


# 640 x 480 in a square of side 640: 80 rows above and below. The true box, 100..300 x 120..360, is
# x 0.15625..0.46875, y 0.3125..0.6875 of the square and y 0.25..0.75 of the picture.
TRUTH = (100.0, 120.0, 300.0, 360.0)
RIGHT = "[0.15625, 0.3125, 0.46875, 0.6875]"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unpad", 1.0),
        # y 0.3125..0.6875 against 0.25..0.75: 0.375 / 0.5.
        ("lmms", 0.75),
        # The truth is [0.156, 0.312, 0.469, 0.688]: (0.3125 * 0.375) / (0.313 * 0.376).
        ("shikra", 0.1171875 / 0.117688),
        # Rows 150..330 against 120..360, 201 columns of both: 181 / 241.
        ("minigpt-v2", 181 / 241),
        # The truth is [0.16, 0.25, 0.47, 0.75], the answer x 0.15625..0.46875: of one height.
        ("vlm-evaluation", (0.46875 - 0.16) / (0.47 - 0.15625)),
    ],
)
def test_right_answer_about_a_padded_square(name, expected):
    assert iou(name, RIGHT, TRUTH) == pytest.approx(expected, abs=1e-12)


def test_without_unpadding_a_right_answer_at_the_top_of_a_wide_picture_is_wrong():
    # Rows 0..48 are y 0.125..0.2 of the square, and 0..0.1 of the picture.
    truth, text = (0.0, 0.0, 64.0, 48.0), "[0.0, 0.125, 0.1, 0.2]"
    assert iou("unpad", text, truth) == pytest.approx(1.0)
    assert iou("vlm-evaluation", text, truth) == pytest.approx(1.0)
    assert iou("lmms", text, truth) == 0.0


def test_squeeze_of_y_without_unpadding_is_from_an_eighth_to_seven_eighths():
    # The whole picture, answered rightly: 0.75 of it is left.
    assert iou("lmms", "[0.0, 0.125, 1.0, 0.875]", (0.0, 0.0, 640.0, 480.0)) == 0.75


def test_tall_picture_is_squeezed_in_x():
    text, truth, size = "[0.125, 0.0, 0.875, 1.0]", (0.0, 0.0, 480.0, 640.0), (480, 640)
    assert iou("lmms", text, truth, size=size) == 0.75
    assert iou("unpad", text, truth, size=size) == 1.0
    assert iou("vlm-evaluation", text, truth, size=size) == 1.0
    assert iou("shikra", text, truth, size=size) == 1.0


def test_shikra_s_truth_is_rounded_to_three_decimals_in_the_square():
    text = "[0.156, 0.312, 0.469, 0.688]"
    assert iou("shikra", text, TRUTH) == 1.0
    assert iou("unpad", text, TRUTH) < 1.0


def test_shikra_s_odd_padding_is_rounded_down():
    # 5 x 2 in a square of side 5: one row above, two below.
    assert iou("shikra", "[0.0, 0.2, 1.0, 0.6]", (0.0, 0.0, 5.0, 2.0), size=(5, 2)) == 1.0


def test_vlm_evaluation_s_truth_is_rounded_to_two_decimals_of_the_picture():
    # 101..299 x 121..361 is x 0.158..0.467, y 0.252..0.752: [0.16, 0.25, 0.47, 0.75].
    text = "[0.16, 0.3125, 0.47, 0.6875]"
    assert iou("vlm-evaluation", text, (101.0, 121.0, 299.0, 361.0)) == pytest.approx(1.0)


def test_vlm_evaluation_clips_what_is_answered_in_the_padding():
    text, truth = "[0.0, 0.0, 1.0, 0.5]", (0.0, 0.0, 640.0, 240.0)
    assert iou("vlm-evaluation", text, truth) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ("<0><0><9><9>", 1.0),
        ("<0><0><4><9>", 0.5),  # 5 x 10 of 10 x 10
        ("<0><0><0><9>", 0.1),  # one column
        ("<9><9><20><20>", 1 / (100 + 144 - 1)),  # the corner pixel is in both
        ("<10><0><12><9>", 0.0),  # neighbours
        ("<9><9><0><0>", 0.0),  # corners are not put in order
    ],
)
def test_minigpt_v2_counts_both_ends(numbers, expected):
    found = iou("minigpt-v2", f"{{{numbers}}}", (0.0, 0.0, 9.0, 9.0), ANGLED, (100, 100))
    assert found == pytest.approx(expected, abs=1e-12)


def test_minigpt_v2_scales_by_width_and_height():
    # 10..50 of 200 columns, 20..60 of 100 rows, in hundredths.
    text, truth = "{<10><20><50><60>}", (20.0, 20.0, 100.0, 60.0)
    assert iou("minigpt-v2", text, truth, ANGLED, (200, 100)) == pytest.approx(1.0)


HALF = "[0.0, 0.0, 0.5, 1.0]"


@pytest.mark.parametrize(
    ("name", "hit"),
    [("unpad", False), ("lmms", True), ("shikra", False), ("vlm-evaluation", True)],
)
def test_iou_of_exactly_a_half_hits_where_the_convention_says_so(name, hit):
    found = iou(name, HALF, (0.0, 0.0, 100.0, 100.0), size=(100, 100))
    assert found == 0.5
    assert PROTOCOLS[name].is_hit(found, 0.5) is hit


def test_minigpt_v2_s_threshold_is_not_a_hit():
    assert not MINIGPT.is_hit(0.5, 0.5)
    assert MINIGPT.is_hit(0.5000001, 0.5)


@EVERY
def test_other_thresholds_follow_the_same_comparison(name):
    protocol = PROTOCOLS[name]
    assert protocol.is_hit(0.7, 0.7) == protocol.is_hit(0.5) == (name in {"lmms", "vlm-evaluation"})
    assert protocol.is_hit(0.71, 0.7) and not protocol.is_hit(0.69, 0.7)


def test_only_unpad_puts_corners_in_order():
    text, truth = "[1.0, 1.0, 0.0, 0.0]", (0.0, 0.0, 100.0, 100.0)
    found = {name: iou(name, text, truth, size=(100, 100)) for name in PROTOCOLS}
    assert found == dict.fromkeys(PROTOCOLS, 0.0) | {"unpad": 1.0}


@EVERY
@pytest.mark.parametrize("text", ["", "I do not see it.", "[0.5, 0.5, 0.5, 0.5]"])
def test_answer_without_a_box_or_without_area_has_no_overlap(name, text):
    if name == "minigpt-v2" and "[" in text:
        # With both ends counted it is one pixel of the 2 x 2.
        assert iou(name, text, (1.0, 1.0, 2.0, 2.0), size=(2, 2)) == pytest.approx(0.25)
    else:
        assert iou(name, text, (1.0, 1.0, 2.0, 2.0), size=(2, 2)) == 0.0


@EVERY
def test_question_that_could_not_be_asked_has_no_overlap(name):
    failed = Record(
        question_id="7-0",
        text="",
        fractions=None,
        box=None,
        image_size=(0, 0),
        num_kept_tokens=0,
        num_visual_tokens=0,
        error="not a picture",
    )
    assert PROTOCOLS[name].iou(failed, question(TRUTH), PADDED) == 0.0
    assert PROTOCOLS[name].read(failed) is None


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("[0.1, 0.2, 0.3, 0.4]", True),
        ("[ 0.1,0.2,\n0.3, 0.4 ]", True),
        ("[1] or [0.1, 0.2, 0.3, 0.4] or [0, 0, 1, 1]", True),
        ("[0.1 , 0.2, 0.3, 0.4]", False),
        ("[+0.1, 0.2, 0.3, 0.4]", False),
        ("[.1, 0.2, 0.3, 0.4]", False),
        ("[0.1, 0.2, 0.3, 0.4", False),
        ("(0.1, 0.2, 0.3, 0.4)", False),
        ("[10%, 20%, 30%, 40%]", False),
        ("[" + "9" * 400 + ", 0, 0, 0]", False),
    ],
)
def test_lmms_reads_answers_by_its_own_rule(text, read):
    answer = record(text, WHOLE, (100, 100))
    assert (LMMS.read(answer) is not None) == read
    expected = 1.0 if read else 0.0
    found = LMMS.iou(answer, question((10.0, 20.0, 30.0, 40.0), (100, 100)), WHOLE)
    assert found == pytest.approx(expected)


def test_lmms_does_not_divide_by_the_model_s_scale():
    spec = BoxSpec(syntax="bracketed", scale=100.0, frame="image")
    text, truth = "[10, 20, 30, 40]", (10.0, 20.0, 30.0, 40.0)
    assert iou("lmms", text, truth, spec, (100, 100)) == 0.0
    assert iou("unpad", text, truth, spec, (100, 100)) == pytest.approx(1.0)


def test_lmms_reads_no_answer_of_a_model_with_angled_boxes():
    answer = record("{<10><20><30><40>}", ANGLED)
    assert LMMS.read(answer) is None
    assert OURS.read(answer) == (0.1, 0.2, 0.3, 0.4)


@pytest.mark.parametrize("name", ["unpad", "shikra", "vlm-evaluation"])
def test_model_without_padding_is_judged_in_the_picture(name):
    text, truth = "{<10><20><30><40>}", (64.0, 96.0, 192.0, 192.0)
    assert iou(name, text, truth, ANGLED) == pytest.approx(1.0)


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 999), st.integers(1, 999)),
    st.lists(st.integers(0, 1000), min_size=4, max_size=4),
    st.lists(st.integers(0, 1000), min_size=4, max_size=4),
    st.sampled_from([PADDED, WHOLE]),
)
def test_overlap_is_a_share_under_every_protocol(size, answer, truth, spec):
    text = "[" + ", ".join(f"{value / 1000:.3f}" for value in answer) + "]"
    width, height = size
    x1, x2 = sorted(value * width / 1000 for value in truth[:2])
    y1, y2 = sorted(value * height / 1000 for value in truth[2:])
    for name in PROTOCOLS:
        assert 0.0 <= iou(name, text, (x1, y1, x2, y2), spec, size) <= 1.0 + 1e-12


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("shikra", "shikra"),
        ("minigpt_v2", "minigpt-v2"),
        ("llava", "unpad"),
        ("llava_next", "unpad"),
        ("another", "unpad"),
    ],
)
def test_native_protocol_is_that_of_the_family_s_authors(family, name):
    assert resolve_protocol("native", family, WHOLE).name == name


@EVERY
def test_named_protocol_is_taken_whatever_the_family(name):
    assert resolve_protocol(name, "shikra", PADDED) is PROTOCOLS[name]


def test_unknown_protocol_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match="'coco'; allowed: native, unpad, lmms, shikra"):
        resolve_protocol("coco", "llava", PADDED)


def test_a_protocol_that_does_not_read_the_models_boxes_is_refused():
    with pytest.raises(
        UsageError, match=r"does not read this model's boxes.*allowed: native, unpad"
    ):
        resolve_protocol("lmms", "minigpt_v2", ANGLED)
    assert {one.name for one in applicable(ANGLED)} == PROTOCOLS.keys() - {"lmms"}
    assert {one.name for one in applicable(PADDED)} == PROTOCOLS.keys()


@EVERY
def test_protocol_can_be_sent_to_another_process(name):
    copy = pickle.loads(pickle.dumps(PROTOCOLS[name]))
    assert copy == PROTOCOLS[name]
