"""Answers on another scale than the model's: what is said of them, and of which it is not."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest

from gap_export.runtime.answers import read_answer
from gap_export.runtime.images.geometry import ImageGeometry
from gap_export.spec.manifest import BoxSpec


def spec(scale: float, syntax: Literal["bracketed", "angled"] = "bracketed") -> BoxSpec:
    return BoxSpec(syntax=syntax, scale=scale, frame="image")


ONE, HUNDRED, THOUSAND = spec(1.0), spec(100.0), spec(1000.0)
ANGLED = spec(100.0, "angled")


@pytest.mark.parametrize(
    ("text", "box_spec", "is_out"),
    [
        # Pixels of 640 x 480, thousandths, percent.
        ("[0, 0, 320, 240]", ONE, True),
        ("[0.2, 0.3, 4.0, 5.0]", ONE, True),
        ("[120, 250, 510, 990]", ONE, True),
        ("[12, 25, 51, 99]", ONE, True),
        ("(12, 25, 51, 99)", ONE, True),
        ("[320, 240, 400, 300]", ONE, True),
        ("[-0.3, 0.2, 0.4, 0.5]", ONE, True),
        ("[-320, -240, 0.5, 0.5]", ONE, True),
        ("[0, 0, 320, 240]", HUNDRED, True),
        ("{<12><25><510><99>}", ANGLED, True),
        ("<12><25><510><99>", ANGLED, True),
        ("[12, 25, 51, 1300]", THOUSAND, True),
        ("[150%, 20%, 300%, 40%]", ONE, True),
        # Fractions, where whole numbers are asked for: a box in the corner.
        ("[0.2, 0.3, 0.5, 0.6]", THOUSAND, True),
        ("[0.2, 0.3, 0.5, 0.6]", HUNDRED, True),
        ("[0, 0, 1, 1]", THOUSAND, True),
        # As the model should, or nearly.
        ("[0.2, 0.3, 0.5, 0.6]", ONE, False),
        ("[0, 0, 1, 1]", ONE, False),
        ("[0.0, 0.0, 1.00, 1.01]", ONE, False),
        ("[0.0, 0.0, 1.05, 0.5]", ONE, False),
        ("[-0.01, 0.0, 0.5, 0.5]", ONE, False),
        ("[0.1, 0.2, 1.06, 0.9]", ONE, True),
        ("{<0><0><100><101>}", ANGLED, False),
        ("{<0><0><2><2>}", ANGLED, False),
        ("[0, 0, 1000, 1003]", THOUSAND, False),
        ("[0.5, 0.5, 900, 900]", THOUSAND, False),
        ("[10%, 20%, 30%, 40%]", ONE, False),
        ("[10%, 20%, 30%, 40%]", THOUSAND, False),
        # Nothing, and nothing to say of it.
        ("[0, 0, 0, 0]", ONE, False),
        ("[0, 0, 0, 0]", THOUSAND, False),
        ("no box", ONE, False),
    ],
)
def test_a_box_on_another_scale_is_a_warning(sample_manifest, text, box_spec, is_out):
    manifest = dataclasses.replace(sample_manifest, box=box_spec)
    _, warnings = read_answer(text, [9, 2], manifest, ImageGeometry(width=640, height=480))
    said = (
        f"the box is out of scale, its coordinates should run from 0 to {box_spec.scale:g}: "
        f"{text!r}"
    )
    assert (said in warnings) == is_out


def test_a_box_that_is_clipped_to_nothing_says_why(sample_manifest):
    boxes, warnings = read_answer(
        "[320, 240, 400, 300]", [9, 2], sample_manifest, ImageGeometry(width=640, height=480)
    )
    assert not boxes
    assert [text.split(":")[0] for text in warnings] == [
        "the box is out of scale, its coordinates should run from 0 to 1",
        "the answer lies outside the image",
    ]


def test_a_box_in_the_padding_is_in_scale(sample_manifest):
    geometry = ImageGeometry(width=640, height=480)
    assert sample_manifest.box.frame == "padded_square"
    for text in ("[0.1, 0.0, 0.9, 0.2]", "[0.1, 0.0, 0.9, 0.1]"):
        _, warnings = read_answer(text, [9, 2], sample_manifest, geometry)
        assert not any("scale" in warning for warning in warnings)
