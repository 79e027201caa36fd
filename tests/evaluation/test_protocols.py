"""The conventions of IoU, by examples worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gap_export.errors import UsageError
from gap_export.evaluation.protocols import PROTOCOLS, applicable, resolve_protocol
from gap_export.evaluation.records import Record
from gap_export.families import native_protocol
from gap_export.spec.manifest import BoxSpec
from tests.evaluation.answers import ANGLED, PADDED, WHOLE, question, record

OURS, OWN, LMMS, SHIKRA, MINIGPT, _, INTERNVL = PROTOCOLS.values()
THOUSANDTHS = BoxSpec(syntax="bracketed", scale=1000.0, frame="image")
# How the models of a protocol write boxes, where that is not as PADDED.
SPECS = {"minigpt-v2": ANGLED, "internvl": THOUSANDTHS}
EVERY = pytest.mark.parametrize("name", list(PROTOCOLS))


def iou(name: str, text: str, box, spec: BoxSpec = PADDED, size=(640, 480)) -> float:
    return PROTOCOLS[name].iou(record(text, spec, size), question(box, size), spec)


def overlap(name: str, answer, box, spec: BoxSpec = PADDED, size=(640, 480)) -> float:
    """IoU of coordinates 0..1, written as the protocol's model does, with the true box."""
    if name == "minigpt-v2":
        text = "{" + "".join(f"<{round(100 * value)}>" for value in answer) + "}"
        return iou(name, text, box, ANGLED, size)
    if name == "internvl":
        text = f"[[{', '.join(f'{round(1000 * value)}' for value in answer)}]]"
        return iou(name, text, box, THOUSANDTHS, size)
    separator = "," if name == "shikra" else ", "
    return iou(name, f"[{separator.join(f'{float(value)}' for value in answer)}]", box, spec, size)


def test_protocols_are_those_of_the_fact_sheet_in_order():
    assert list(PROTOCOLS) == [
        "tolerant", "unpad", "lmms", "shikra", "minigpt-v2", "vlm-evaluation", "internvl",
    ]  # fmt: skip


# 640 x 480 in a square of side 640: 80 rows above and below. The true box, 100..300 x 120..360, is
# x 0.15625..0.46875, y 0.3125..0.6875 of the square and y 0.25..0.75 of the image.
TRUTH = (100.0, 120.0, 300.0, 360.0)
RIGHT = (0.15625, 0.3125, 0.46875, 0.6875)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("tolerant", 1.0),
        ("unpad", 1.0),
        # y 0.3125..0.6875 against 0.25..0.75: 0.375 / 0.5.
        ("lmms", 0.75),
        # The truth is [0.156, 0.312, 0.469, 0.688]: (0.3125 * 0.375) / (0.313 * 0.376).
        ("shikra", 0.1171875 / 0.117688),
        # x 0.16..0.47 of 640 and y 0.31..0.69 of 480, which is not of the square: columns
        # 102.4..300.8 against 100..300, rows 148.8..331.2 against 120..360.
        ("minigpt-v2", (198.6 * 183.4) / (199.4 * 183.4 + 201 * 241 - 198.6 * 183.4)),
        # The truth is [0.16, 0.25, 0.47, 0.75], the answer x 0.15625..0.46875: of one height.
        ("vlm-evaluation", (0.46875 - 0.16) / (0.47 - 0.15625)),
    ],
)
def test_right_answer_about_a_padded_square(name, expected):
    close = 1e-6 if name == "shikra" else 1e-12  # which computes in float32
    assert overlap(name, RIGHT, TRUTH) == pytest.approx(expected, abs=close)


AT_THE_TOP, ALL, ALL_TALL = (
    (0.0, 0.0, 64.0, 48.0),
    (0.0, 0.0, 640.0, 480.0),
    (0.0, 0.0, 480.0, 640.0),
)


@pytest.mark.parametrize(
    ("name", "text", "truth", "size", "expected"),
    [
        # Rows 0..48 are y 0.125..0.2 of the square, and 0..0.1 of the image.
        ("unpad", "[0.0, 0.125, 0.1, 0.2]", AT_THE_TOP, (640, 480), 1.0),
        ("vlm-evaluation", "[0.0, 0.125, 0.1, 0.2]", AT_THE_TOP, (640, 480), 1.0),
        ("lmms", "[0.0, 0.125, 0.1, 0.2]", AT_THE_TOP, (640, 480), 0.0),
        # The whole image, answered rightly: without unpadding 0.75 of it is left.
        ("lmms", "[0.0, 0.125, 1.0, 0.875]", ALL, (640, 480), 0.75),
        ("lmms", "[0.125, 0.0, 0.875, 1.0]", ALL_TALL, (480, 640), 0.75),
        ("unpad", "[0.125, 0.0, 0.875, 1.0]", ALL_TALL, (480, 640), 1.0),
        ("vlm-evaluation", "[0.125, 0.0, 0.875, 1.0]", ALL_TALL, (480, 640), 1.0),
        ("shikra", "[0.125,0.0,0.875,1.0]", ALL_TALL, (480, 640), 1.0),
        # Shikra's truth has three decimals in the square; 5 x 2 has one row above and two below.
        ("shikra", "[0.156,0.312,0.469,0.688]", TRUTH, (640, 480), 1.0),
        ("shikra", "[0.0,0.2,1.0,0.6]", (0.0, 0.0, 5.0, 2.0), (5, 2), 1.0),
        # Its truth has two decimals: 101..299 x 121..361 is x 0.158..0.467, y 0.252..0.752.
        (
            *("vlm-evaluation", "[0.16, 0.3125, 0.47, 0.6875]"),
            *((101.0, 121.0, 299.0, 361.0), (640, 480), 1.0),
        ),
        # What is answered in the padding is clipped.
        ("vlm-evaluation", "[0.0, 0.0, 1.0, 0.5]", (0.0, 0.0, 640.0, 240.0), (640, 480), 1.0),
        # 10..50 of 200 columns, 20..60 of 100 rows, in hundredths.
        ("minigpt-v2", "{<10><20><50><60>}", (20.0, 20.0, 100.0, 60.0), (200, 100), 1.0),
    ],
)
def test_boxes_are_compared_in_the_frame_of_the_convention(name, text, truth, size, expected):
    spec = ANGLED if name == "minigpt-v2" else PADDED
    assert iou(name, text, truth, spec, size) == pytest.approx(expected, abs=1e-9)


def test_only_shikra_rounds_the_truth_to_three_decimals():
    assert iou("unpad", "[0.156,0.312,0.469,0.688]", TRUTH) < 1.0


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


HALF = (0.0, 0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("name", "hit"),
    [
        ("tolerant", False),
        ("unpad", False),
        ("lmms", True),
        ("shikra", False),
        ("vlm-evaluation", True),
        ("internvl", True),
    ],
)
def test_iou_of_exactly_a_half_hits_where_the_convention_says_so(name, hit):
    found = overlap(name, HALF, (0.0, 0.0, 100.0, 100.0), size=(100, 100))
    assert found == 0.5
    assert PROTOCOLS[name].is_hit(found, 0.5) is hit


def test_minigpt_v2_s_threshold_is_not_a_hit():
    assert not MINIGPT.is_hit(0.5, 0.5)
    assert MINIGPT.is_hit(0.5000001, 0.5)


@EVERY
def test_other_thresholds_follow_the_same_comparison(name):
    protocol = PROTOCOLS[name]
    inclusive = name in {"lmms", "vlm-evaluation", "internvl"}
    assert protocol.is_hit(0.7, 0.7) == protocol.is_hit(0.5) == inclusive
    assert protocol.is_hit(0.71, 0.7) and not protocol.is_hit(0.69, 0.7)


def test_only_ours_put_corners_in_order():
    answer, truth = (1.0, 1.0, 0.0, 0.0), (0.0, 0.0, 100.0, 100.0)
    found = {name: overlap(name, answer, truth, size=(100, 100)) for name in PROTOCOLS}
    assert found == dict.fromkeys(PROTOCOLS, 0.0) | {"tolerant": 1.0, "unpad": 1.0}


@EVERY
def test_answer_without_a_box_or_without_area_has_no_overlap(name):
    truth, size = (1.0, 1.0, 2.0, 2.0), (2, 2)
    assert iou(name, "", truth, size=size) == iou(name, "I do not see it.", truth, size=size) == 0.0
    # With both ends counted it is one pixel of the 2 x 2.
    expected = 0.25 if name == "minigpt-v2" else 0.0
    assert overlap(name, (0.5, 0.5, 0.5, 0.5), truth, size=size) == pytest.approx(expected)


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
        error="not an image",
    )
    assert PROTOCOLS[name].iou(failed, question(TRUTH), PADDED) == 0.0
    assert PROTOCOLS[name].read(failed, PADDED) is None


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
    assert (LMMS.read(answer, WHOLE) is not None) == read
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
    assert LMMS.read(answer, ANGLED) is None
    assert OURS.read(answer, ANGLED) == (0.1, 0.2, 0.3, 0.4)


@pytest.mark.parametrize("name", ["tolerant", "unpad", "shikra", "vlm-evaluation"])
def test_model_without_padding_is_judged_in_the_image(name):
    answer, truth = (0.1, 0.2, 0.3, 0.4), (64.0, 96.0, 192.0, 192.0)
    assert overlap(name, answer, truth, WHOLE) == pytest.approx(1.0)


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 999), st.integers(1, 999)),
    st.lists(st.integers(0, 1000), min_size=4, max_size=4),
    st.lists(st.integers(0, 1000), min_size=4, max_size=4),
    st.sampled_from([PADDED, WHOLE]),
)
def test_overlap_is_a_share_under_every_protocol(size, answer, truth, spec):
    width, height = size
    x1, x2 = sorted(value * width / 1000 for value in truth[:2])
    y1, y2 = sorted(value * height / 1000 for value in truth[2:])
    for name in PROTOCOLS:
        found = overlap(name, [value / 1000 for value in answer], (x1, y1, x2, y2), spec, size)
        assert 0.0 <= found <= 1.0 + 1e-12


@pytest.mark.parametrize(
    ("family", "spec", "name"),
    [
        ("shikra", PADDED, "shikra"),
        ("minigpt_v2", ANGLED, "minigpt-v2"),
        ("internvl", THOUSANDTHS, "internvl"),
        ("llava", PADDED, "tolerant"),
        ("llava_next", PADDED, "tolerant"),
        ("another", ANGLED, "tolerant"),
    ],
)
def test_native_protocol_is_what_the_family_declares(family, spec, name):
    assert resolve_protocol("native", native_protocol(family), spec).name == name


@EVERY
def test_named_protocol_is_taken_whatever_the_family(name):
    spec = SPECS.get(name, PADDED)
    assert resolve_protocol(name, "shikra", spec) is PROTOCOLS[name]


def test_unknown_protocol_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match="'coco'; allowed: native, tolerant, unpad, lmms, shikra"):
        resolve_protocol("coco", None, PADDED)


@pytest.mark.parametrize(
    ("name", "spec", "allowed"),
    [
        ("lmms", ANGLED, "tolerant, unpad, minigpt-v2"),
        ("shikra", ANGLED, "tolerant, unpad, minigpt-v2"),
        ("native", ANGLED, "tolerant, unpad, minigpt-v2"),
        ("minigpt-v2", PADDED, "tolerant, unpad, lmms, shikra, vlm-evaluation"),
    ],
)
def test_a_protocol_that_does_not_read_the_models_boxes_is_refused(name, spec, allowed):
    with pytest.raises(UsageError, match=f"does not read this model's boxes.*allowed: {allowed}$"):
        resolve_protocol(name, "shikra", spec)
    assert ", ".join(one.name for one in applicable(spec)) == allowed


# What Shikra's rec.py, MiniGPT-v2's eval_ref.py and vlm-evaluation's refcoco.py make of texts.
BOX = (0.1, 0.2, 0.3, 0.4)
READINGS = {
    "shikra": [
        ("[0.100,0.200,0.300,0.400]", BOX),
        ("Answer: [0.1,0.2,0.3,0.4] .", BOX),
        ("[0.,0,1,1.000]", (0, 0, 1, 1)),
        ("[0.1 ,0.2 ,0.3 ,0.4]", BOX),  # decoding takes these spaces out
        ("[0 .1,0.2,0.3,0.4]", BOX),
        ("[9.5,0.2,0.3,0.4]", (9.5, 0.2, 0.3, 0.4)),
        ("[1] [0.1,0.2] [0.1,0.2,0.3,0.4]", BOX),
        ("[0.1, 0.2, 0.3, 0.4]", None),  # a space
        ("[ 0.1,0.2,0.3,0.4]", None),
        ("[0.1,0.2,0.3,0.4][0.5,0.6,0.7,0.8]", None),  # two boxes
        ("[0.1,0.2,0.3,0.4] and again [0.1,0.2,0.3,0.4]", None),
        ("[0.1,0.2,0.3,0.4;0.5,0.6,0.7,0.8]", None),
        ("[10,20,30,40]", None),
        ("[-0.1,0.2,0.3,0.4]", None),
        ("[.1,.2,.3,.4]", None),
        ("(0.1,0.2,0.3,0.4)", None),
        ("[0.1,0.2,0.3,0.4", None),
        ("[0.1,0.2,0.3]", None),
        ("[0.1,0.2,0.3,0.4,0.5]", None),
        ("[10%,20%,30%,40%]", None),
    ],
    "minigpt-v2": [
        ("{<10><20><30><40>}", BOX),
        (" { <10> <20> <30> < 4 0 > }\n", BOX),
        ("{<10><20><30><40>} is the cup", BOX),
        ("<unk>{<10><20><30><40>}", BOX),
        ("words [/INST] {<10><20><30><40>}", BOX),
        ("{<010><20><30><140>}", (0.1, 0.2, 0.3, 1.4)),
        ("the cup {<10><20><30><40>}", None),  # not at the beginning
        ("<p>cup</p>{<10><20><30><40>}", None),
        ("{<10><20><30><40>}<delim>{<50><60><70><80>}", None),  # another number
        ("{<10><20><30><40>} cup 2", None),
        ("{<10><20><30><1000>}", None),
        ("{<10><20><30>}", None),
        ("{<10><20><30><40><50>}", None),
        ("<10><20><30><40>", None),
        ("{<10>,<20>,<30>,<40>}", None),
        ("{<10>\n<20><30><40>}", None),
        ("{<10.5><20><30><40>}", None),
        ("[0.1, 0.2, 0.3, 0.4]", None),
    ],
    "vlm-evaluation": [
        ("[0.1, 0.2, 0.3, 0.4]", BOX),
        ("  [.1,2e-1,\n0.3,+0.4,] ", BOX),
        ("[0, 0, 1, 1]", (0, 0, 1, 1)),
        ("The cup: [0.1, 0.2, 0.3, 0.4]", None),
        ("[0.1, 0.2, 0.3, 0.4].", None),
        ("[0.3, 0.2, 0.1, 0.4]", None),  # corners
        ("[0.1, 0.2, 0.1, 0.4]", None),
        ("[0.1, 0.2, 0.3, 1.01]", None),
        ("[-0.1, 0.2, 0.3, 0.4]", None),
        ("[0, 0, 01, 01]", None),
        ("BOX", None),
    ],
    "internvl": [
        ("the cup[[100, 200, 300, 400]]", (0.1, 0.2, 0.3, 0.4)),
        ("[100, 200, 300, 400]", (0.1, 0.2, 0.3, 0.4)),
        ("[[100, 200, 300, 400], [500, 600, 700, 800]]", (0.1, 0.2, 0.3, 0.4)),
        ("[[0.1, 0.2, 0.3, 0.4]]", (0.1, 0.2, 0.3, 0.4)),  # fractions
        ("[[1, 1, 1, 0]]", (1.0, 1.0, 1.0, 0.0)),  # add up to 3
        ("[[1, 1, 1, 1]]", (0.001, 0.001, 0.001, 0.001)),  # add up to 4
        ("[300, 200, 100, 400]", (0.3, 0.2, 0.1, 0.4)),  # corners are not put in order
        ("[100, 200, 300, 1400]", (0.1, 0.2, 0.3, 1.4)),  # nothing is clipped
        ("[1] the cup [100, 200, 300, 400]", None),  # the first bracket is another
        ("[100, 200, 300, 400", None),
        ("[100, 200, 300]", None),
        ("[100, 200, 300, 400, 500]", None),
        ("[left, 200, 300, 400]", None),
        ("[inf, 200, 300, 400]", None),
    ],
}


def test_internvl_compares_fractions_of_each_side():
    # 64..192 of 640 and 96..192 of 480.
    answer, truth = "[[100, 200, 300, 400]]", (64.0, 96.0, 192.0, 192.0)
    assert iou("internvl", answer, truth, THOUSANDTHS) == pytest.approx(1.0)
    assert iou("internvl", "[[300, 200, 100, 400]]", truth, THOUSANDTHS) == 0.0
    assert iou("internvl", "[1] " + answer, truth, THOUSANDTHS) == 0.0
    assert iou("tolerant", "[1] " + answer, truth, THOUSANDTHS) == pytest.approx(1.0)


def test_internvl_s_program_is_not_asked_about_other_scales():
    assert INTERNVL not in applicable(PADDED)
    assert INTERNVL in applicable(THOUSANDTHS)


@pytest.mark.parametrize(
    ("name", "text", "box"),
    [(name, *reading) for name, readings in READINGS.items() for reading in readings],
)
def test_answers_are_read_as_the_protocol_s_own_program_does(name, text, box):
    spec = SPECS.get(name, PADDED)
    assert PROTOCOLS[name].read(record(text, spec), spec) == box


def test_ours_differ_in_what_they_read_alone():
    for text in ("(0.1, 0.2, 0.3, 0.4)", "[10%, 20%, 30%, 40%]", "[0.1; 0.2; 0.3; 0.4]"):
        answer = record(text, WHOLE, (100, 100))
        assert OURS.read(answer, WHOLE) == pytest.approx((0.1, 0.2, 0.3, 0.4))
        assert OWN.read(answer, WHOLE) is None


def test_shikra_s_half_is_decided_in_float32():
    """As torch computes it: of ties that are halves in thousandths, float32 makes some a hit."""
    rng = np.random.default_rng(0)
    hits = set()
    for left, top, width, height in rng.integers(1, 300, size=(300, 4)).tolist():
        answer = [value / 1000 for value in (left, top, left + width, top + height)]
        truth = [answer[0], answer[1], (left + 2 * width) / 1000, answer[3]]
        one, other = (torch.tensor(box) * 1000 for box in (answer, truth))
        sides = (torch.minimum(one[2:], other[2:]) - torch.maximum(one[:2], other[:2])).clamp(min=0)
        shared = sides.prod()
        area, area_of_truth = ((box[2:] - box[:2]).prod() for box in (one, other))
        expected = float(shared / (area + area_of_truth - shared))
        box = tuple(1000 * value for value in truth)
        found = overlap("shikra", answer, box, size=(1000, 1000))
        assert found == expected == pytest.approx(0.5, abs=1e-6)
        hits.add(SHIKRA.is_hit(found))
    assert hits == {False, True}
