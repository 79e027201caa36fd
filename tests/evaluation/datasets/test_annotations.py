from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gap_export.errors import UsageError
from gap_export.evaluation.datasets import annotations
from gap_export.evaluation.datasets.annotations import Annotation, assemble, check_box
from gap_export.evaluation.questions import Dataset, ImageSource

ONE = Annotation(
    id="1",
    image_id="a",
    image=ImageSource(path=Path("a.png")),
    image_name="a.jpg",
    expression="the cat",
    box=(1.0, 2.0, 3.0, 4.0),
    image_size=(64, 48),
    kind=None,
    split="val",
)


def made(*given: Annotation, samples: int | None = None) -> Dataset:
    return assemble(
        given,
        spec="refcoco:x:val",
        name="refcoco",
        layout="refer",
        splits=("val",),
        samples=samples,
        looked_in="here",
    )


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((0.0, 0.0, 64.0, 48.0), (0.0, 0.0, 64.0, 48.0)),
        # What rounding does is cut off.
        ((-1.0, -0.5, 64.99, 49.0), (0.0, 0.0, 64.0, 48.0)),
        ((-1.01, 0.0, 10.0, 10.0), "box outside the picture"),
        ((0.0, 0.0, 65.01, 10.0), "box outside the picture"),
        ((0.0, 40.0, 10.0, 49.5), "box outside the picture"),
        ((100.0, 100.0, 110.0, 110.0), "box outside the picture"),
        # Wholly in the slack: nothing is left of it.
        ((64.0, 0.0, 65.0, 10.0), "box outside the picture"),
        ((5.0, 5.0, 5.0, 10.0), "empty box"),
        ((5.0, 5.0, 9.0, 5.0), "empty box"),
        ((9.0, 5.0, 5.0, 10.0), "empty box"),
    ],
)
def test_check_box_cuts_a_pixel_and_refuses_more(
    box: tuple[float, float, float, float], expected: object
) -> None:
    assert check_box(box, (64, 48)) == expected


def test_check_box_without_a_size_knows_two_borders() -> None:
    assert check_box((3.0, 4.0, 5e4, 6e4), None) == (3.0, 4.0, 5e4, 6e4)
    assert check_box((-5.0, 4.0, 50.0, 60.0), None) == "box outside the picture"


def test_assemble_brings_images_together_in_their_order() -> None:
    data = made(
        replace(ONE, id="1", image_id="a"),
        replace(ONE, id="2", image_id="b"),
        replace(ONE, id="3", image_id="a"),
    )
    assert [question.id for question in data.questions] == ["1", "3", "2"]


def test_assemble_one_image_has_one_source() -> None:
    data = made(ONE, replace(ONE, id="2", image=ImageSource(path=Path("copy.png"))))
    first, second = data.questions
    assert first.image == second.image == ONE.image


def test_assemble_samples_are_the_first_of_each_split_after_grouping() -> None:
    given = [
        replace(ONE, id=f"{split}{n}", image_id=image, split=split)
        for split in ("val", "testA")
        for n, image in enumerate("aba")
    ]
    data = made(*given, samples=2)
    assert [question.id for question in data.questions] == ["val0", "val2", "testA0", "testA2"]


def test_assemble_counts_what_cannot_be_asked() -> None:
    data = made(
        ONE,
        replace(ONE, id="2", image_id="b", image=None, image_name="b.jpg"),
        replace(ONE, id="3", box=(1.0, 2.0, 1.0, 4.0)),
        replace(ONE, id="4", box=(1.0, 2.0, 90.0, 4.0)),
        replace(ONE, id="5", expression=" \t"),
        replace(ONE, id="6", expression="x" * 10_000),
    )
    assert data.num_expressions == 6
    assert [question.id for question in data.questions] == ["1", "6"]
    assert [(one.question_id, one.reason, one.counts_as_wrong) for one in data.unusable] == [
        ("3", "empty box", False),
        ("4", "box outside the picture", False),
        ("5", "empty expression", False),
        ("2", "missing picture", True),
    ]
    assert data.unusable[1].detail == "box 1, 2, 90, 4, image 64x48"
    assert data.unusable[3].detail == "b.jpg"


def test_assemble_a_wrong_box_of_a_missing_image_is_a_wrong_box() -> None:
    data = made(ONE, replace(ONE, id="2", image_id="b", image=None, box=(0.0, 0.0, 0.0, 0.0)))
    assert data.unusable[0].reason == "empty box"


def test_assemble_the_same_id_twice_is_refused() -> None:
    with pytest.raises(UsageError, match=r"same id.*: 1; allowed"):
        made(ONE, ONE)


def test_assemble_no_image_at_all_says_where_it_looked() -> None:
    with pytest.raises(UsageError, match=r"2 with missing picture.*such as a\.jpg.*here"):
        made(replace(ONE, image=None), replace(ONE, id="2", image=None))


def test_assemble_nothing_to_ask_names_the_first() -> None:
    with pytest.raises(UsageError, match=r"1 with empty box; the first is 1: box 0, 0, 0, 0"):
        made(replace(ONE, box=(0.0, 0.0, 0.0, 0.0)))


def test_assemble_empty_is_refused() -> None:
    with pytest.raises(UsageError, match="no expressions"):
        made()


def test_assemble_too_many_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(annotations, "MAX_EXPRESSIONS", 2)
    with pytest.raises(UsageError, match="too many expressions"):
        made(*(replace(ONE, id=str(n)) for n in range(3)))


@pytest.mark.parametrize(
    "changed",
    [
        replace(ONE, expression="the dog"),
        replace(ONE, box=(1.0, 2.0, 3.0, 4.5)),
        replace(ONE, id="9"),
        replace(ONE, image_id="b"),
        replace(ONE, split="testA"),
        replace(ONE, kind="relation"),
    ],
)
def test_fingerprint_changes_with_what_is_asked(changed: Annotation) -> None:
    assert made(ONE).fingerprint != made(changed).fingerprint


def test_fingerprint_changes_when_a_missing_image_is_found() -> None:
    other = replace(ONE, id="2", image_id="b")
    assert made(ONE, replace(other, image=None)).fingerprint != made(ONE, other).fingerprint


def test_fingerprint_is_not_of_the_place() -> None:
    moved = replace(ONE, image=ImageSource(path=Path("elsewhere.png")))
    assert made(ONE).fingerprint == made(moved).fingerprint
    assert len(made(ONE).fingerprint) == 64
