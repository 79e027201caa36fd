"""What images show of annotations, and what answers say of questions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gap_export.errors import UsageError
from gap_export.evaluation.faults import compare_with_images, failed_questions
from tests.evaluation.answers import WHOLE, question, record

BOX = (10.0, 10.0, 60.0, 50.0)


def answers(asked, size=(640, 480), **changes):
    records = {
        one.id: replace(record("", WHOLE, size), question_id=one.id, **changes) for one in asked
    }
    return {"unpruned": records, "gap": records}


def two(*, box=BOX, annotated=(640, 480)):
    return [question(BOX), replace(question(box, annotated), id="8-0", image_id="8")]


def test_questions_that_fit_their_images_stay():
    asked = two()
    seen = compare_with_images(asked, answers(asked))
    assert (seen.questions, seen.unusable) == (tuple(asked), ())


def test_an_image_of_another_size_than_annotated_is_wrong_and_listed():
    asked = two(annotated=(1280, 960))
    seen = compare_with_images(asked, answers(asked))
    assert [one.id for one in seen.questions] == ["7-0"]
    (listed,) = seen.unusable
    assert (listed.question_id, listed.reason) == ("8-0", "picture of another size")
    assert listed.detail == "annotated 1280x960, it is 640x480"
    assert listed.counts_as_wrong


def test_a_box_outside_of_an_image_without_annotated_size_is_left_out():
    asked = two(box=(500.0, 10.0, 900.0, 50.0), annotated=None)
    seen = compare_with_images(asked, answers(asked))
    (listed,) = seen.unusable
    assert (listed.reason, listed.counts_as_wrong) == ("box outside the picture", False)
    assert "image 640x480" in listed.detail


def test_a_box_beyond_the_border_by_rounding_is_cut_where_no_size_is_annotated():
    asked = two(box=(600.0, 10.0, 640.5, 50.0), annotated=None)
    seen = compare_with_images(asked, answers(asked))
    assert seen.questions[1].box == (600.0, 10.0, 640.0, 50.0)


def test_images_that_are_all_of_another_size_are_refused():
    asked = two(annotated=(10, 10))[1:]
    with pytest.raises(UsageError, match=r"none of the annotations fits.*annotated 10x10"):
        compare_with_images(asked, answers(asked))


def test_an_image_that_was_not_read_says_nothing_about_its_annotation():
    asked = two(annotated=(10, 10))
    given = answers(asked)
    unread = replace(given["gap"]["8-0"], image_size=(0, 0), error="damaged")
    given = {name: {**records, "8-0": unread} for name, records in given.items()}
    assert compare_with_images(asked, given).questions == tuple(asked)


def test_what_could_not_be_asked_is_listed_with_what_it_met():
    asked = two()
    given = answers(asked)
    broken = replace(given["gap"]["7-0"], error="7.jpg: damaged", fault="broken picture")
    given = {name: {**records, "7-0": broken} for name, records in given.items()}
    refused = replace(given["gap"]["8-0"], error="too long", fault="refused expression")
    given["unpruned"] = {**given["unpruned"], "8-0": refused}
    listed = failed_questions(asked, given)
    assert [(one.question_id, one.reason, one.detail) for one in listed] == [
        ("7-0", "broken picture", "7.jpg: damaged"),
        ("8-0", "refused expression", "too long (unpruned alone)"),
    ]
    assert all(one.counts_as_wrong for one in listed)


def test_questions_none_of_which_could_be_asked_are_refused_with_the_first_cause():
    asked = two()
    failed = answers(asked, error="cannot read a.png", fault="broken picture")
    with pytest.raises(UsageError, match=r"none of the expressions could be asked.*cannot read"):
        compare_with_images(asked, failed)
    failed["gap"] = answers(asked)["gap"]
    assert compare_with_images(asked, failed).questions == tuple(asked)


@pytest.mark.parametrize(
    ("fault", "fix"),
    [
        ("broken picture", "; repair the images"),
        (
            "refused expression",
            "; correct the expressions; with --records name another folder then",
        ),
    ],
)
def test_what_is_to_be_mended_is_said(fault, fix):
    asked = two()
    with pytest.raises(UsageError) as refused:
        compare_with_images(asked, answers(asked, (0, 0), error="cannot be", fault=fault))
    assert str(refused.value).endswith(fix)
