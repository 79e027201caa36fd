from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gap_export.errors import UsageError
from gap_export.evaluation.datasets import open_dataset
from gap_export.evaluation.questions import Dataset
from tests.evaluation.datasets.builders import SIZE, coco_name, save_image


def entry(image: int, sents: object, box: object = (1, 2.5, 10, 20), **more: Any) -> dict[str, Any]:
    return {
        "img_id": f"COCO_train2014_{image:012d}_{image + 3}",
        "sents": sents,
        "bbox": list(box) if isinstance(box, tuple) else box,
        "width": SIZE[0],
        "height": SIZE[1],
        **more,
    }


ROWS = [entry(7, "left man"), entry(8, "red bus", (0, 0, 64, 48)), entry(7, "man on the right")]


def write(root: Path, rows: object = None, name: str = "refcoco_val.json") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(ROWS if rows is None else rows))
    for number in (7, 8):
        save_image(root / "train2014" / coco_name(number))
    return root


def opened(root: Path, spec: str = "refcoco:{}:val") -> Dataset:
    return open_dataset(spec.format(root), samples=None, seed=0)


def test_every_row_is_a_question(tmp_path: Path) -> None:
    root = write(tmp_path)
    data = opened(root)
    assert (data.name, data.layout, data.splits) == ("refcoco", "per-split JSON", ("val",))
    assert [(one.id, one.expression, one.image_id) for one in data.questions] == [
        ("val-0", "left man", coco_name(7)),
        ("val-2", "man on the right", coco_name(7)),
        ("val-1", "red bus", coco_name(8)),
    ]
    first = data.questions[0]
    assert first.box == (1.0, 2.5, 11.0, 22.5)
    assert first.image_size == SIZE
    assert first.image.path == root / "train2014" / coco_name(7)


def test_list_of_sentences_is_several_questions(tmp_path: Path) -> None:
    data = opened(write(tmp_path, [entry(7, ["one", "two"]), entry(8, "three")]))
    assert [(one.id, one.expression) for one in data.questions] == [
        ("val-0-0", "one"),
        ("val-0-1", "two"),
        ("val-1", "three"),
    ]


def test_splits_are_the_files(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, [entry(8, "child")], "refcoco_testA.json")
    data = opened(tmp_path, "refcoco:{}:testA,val")
    assert data.splits == ("testA", "val")
    assert [one.split for one in data.questions] == ["testA", "val", "val", "val"]
    with pytest.raises(UsageError, match="no such split: test; allowed: testA, val"):
        opened(tmp_path, "refcoco:{}:test")


def test_sets_in_one_folder_are_told_apart_by_name(tmp_path: Path) -> None:
    write(tmp_path)
    write(tmp_path, [entry(8, "plus")], "refcoco+_val.json")
    assert opened(tmp_path).num_expressions == 3
    assert opened(tmp_path, "refcoco+:{}:val").num_expressions == 1
    with pytest.raises(UsageError, match=r"several data sets.*refcoco\+ .*refcoco .*name one"):
        opened(tmp_path, "{}:val")


def test_folder_of_the_sets_name_is_looked_into(tmp_path: Path) -> None:
    write(tmp_path / "refcoco")
    for number in (7, 8):
        save_image(tmp_path / "images" / coco_name(number))
    assert opened(tmp_path).num_expressions == 3


def test_image_with_another_name_is_found_by_it(tmp_path: Path) -> None:
    save_image(tmp_path / "images" / "yard.png")
    rows = [entry(7, "gate", img_id="yard.png")]
    data = opened(write(tmp_path, rows, "mine_val.json"), "{}")
    assert data.name == "mine"
    assert data.questions[0].image.path == tmp_path / "images" / "yard.png"


def test_long_expression_stays_a_question(tmp_path: Path) -> None:
    data = opened(write(tmp_path, [entry(7, "x" * 10_000), entry(7, "")]))
    assert [len(one.expression) for one in data.questions] == [10_000]
    assert [one.reason for one in data.unusable] == ["empty expression"]


def test_missing_images_are_listed_by_their_file(tmp_path: Path) -> None:
    data = opened(write(tmp_path, [*ROWS, entry(99, "a"), entry(99, "b")]))
    assert data.num_expressions == 5
    assert [one.detail for one in data.unusable] == [coco_name(99)] * 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (5, "row 1: 5"),
        (entry(7, None), "sents of an annotation.*row 1"),
        (entry(7, []), "sents of an annotation.*row 1"),
        (entry(7, "a", "1 2 3 4"), "bbox of an annotation.*row 1"),
        (entry(7, "a", (1, 2, 3)), "bbox of an annotation.*row 1"),
        (entry(7, "a", (1, 2, 3, float("nan"))), "bbox of an annotation.*row 1"),
        (entry(7, "a", img_id=7), "img_id of an annotation.*row 1"),
        (entry(7, "a", img_id="../../etc/passwd"), "img_id of an annotation.*row 1"),
        (entry(7, "a", width=0), "width of an annotation.*row 1"),
        (entry(7, "a", height=None), "height of an annotation.*row 1"),
    ],
)
def test_row_that_cannot_be_used_is_named(tmp_path: Path, row: object, said: str) -> None:
    with pytest.raises(UsageError, match=rf"(?s){said}"):
        opened(write(tmp_path, [ROWS[0], row]))
