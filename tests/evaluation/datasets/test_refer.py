from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gap_export.errors import UsageError
from gap_export.evaluation.datasets import open_dataset
from gap_export.evaluation.questions import Dataset
from tests.evaluation.datasets.builders import (
    BOXES,
    REFS,
    TREE,
    coco_name,
    python2_pickle,
    reference,
    save_image,
    write_refer,
)


def opened(root: Path, name: str = "refcoco", split: str = "val") -> Dataset:
    return open_dataset(f"{name}:{root}:{split}", samples=None, seed=0)


def test_every_sentence_of_a_split_is_a_question(tmp_path: Path) -> None:
    data = opened(write_refer(tmp_path))
    assert (data.name, data.layout, data.splits) == ("refcoco", "refer", ("val",))
    assert [(one.id, one.expression) for one in data.questions] == [
        ("1-10", "left man"),
        ("1-11", "man on the left"),
        ("3-30", "right man"),
        ("2-20", "red bus"),
    ]
    assert not data.unusable


def test_boxes_are_corners_in_pixels(tmp_path: Path) -> None:
    data = opened(write_refer(tmp_path))
    boxes = {one.id: one.box for one in data.questions}
    assert boxes["1-10"] == boxes["1-11"] == (4.0, 5.0, 14.0, 25.0)
    assert boxes["2-20"] == (0.0, 0.0, 64.0, 48.0)
    assert boxes["3-30"] == (30.5, 5.25, 38.5, 14.75)
    assert {one.image_size for one in data.questions} == {(64, 48)}


def test_images_are_those_of_the_annotation_not_of_the_object(tmp_path: Path) -> None:
    root = write_refer(tmp_path)
    paths = {one.id: one.image.path for one in opened(root).questions}
    assert paths["1-10"] == paths["3-30"] == root / TREE / coco_name(7)
    assert {one.image_id for one in opened(root).questions} == {"7", "8"}


def test_other_split_is_another_set(tmp_path: Path) -> None:
    data = opened(write_refer(tmp_path), split="testA")
    assert [one.id for one in data.questions] == ["4-40"]


@pytest.mark.parametrize("protocol", [0, 2])
def test_references_written_by_python_2(tmp_path: Path, protocol: int) -> None:
    root = write_refer(tmp_path)
    new = opened(root)
    (root / "data/refcoco/refs(unc).p").write_bytes(python2_pickle(REFS, protocol))
    assert opened(root).questions == new.questions


@pytest.mark.parametrize(
    "folder",
    ["train2014", "images/train2014", "coco2014/train2014", "images", "", "data/train2014"],
)
def test_images_are_found_where_people_keep_them(tmp_path: Path, folder: str) -> None:
    root = write_refer(tmp_path, images=())
    for number in (7, 8):
        save_image(root / folder / coco_name(number))
    data = opened(root)
    assert not data.unusable
    assert data.questions[0].image.path == root / folder / coco_name(7)


@pytest.mark.parametrize("folder", ["", "refcoco", "data/refcoco", "refer/data/refcoco"])
def test_annotations_are_found_where_people_keep_them(tmp_path: Path, folder: str) -> None:
    assert opened(write_refer(tmp_path, folder=folder)).num_expressions == 4


def test_missing_images_are_counted_and_listed(tmp_path: Path) -> None:
    data = opened(write_refer(tmp_path, images=[8]))
    assert data.num_expressions == 4
    assert [one.id for one in data.questions] == ["2-20"]
    assert [(one.question_id, one.reason, one.detail) for one in data.unusable] == [
        ("1-10", "missing picture", coco_name(7)),
        ("1-11", "missing picture", coco_name(7)),
        ("3-30", "missing picture", coco_name(7)),
    ]


def test_no_images_at_all_is_refused_and_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"4 with missing picture.*mscoco/images/train2014"):
        opened(write_refer(tmp_path, images=()))


def test_wrong_boxes_are_listed(tmp_path: Path) -> None:
    boxes = {
        **BOXES,
        501: (7, [60.0, 5.0, 10.0, 20.0]),
        502: (8, [3.0, 3.0, 0.0, 5.0]),
        503: (7, [60.0, 5.0, 4.75, 20.0]),
    }
    data = opened(write_refer(tmp_path, boxes=boxes))
    assert [(one.question_id, one.reason) for one in data.unusable] == [
        ("1-10", "box outside the picture"),
        ("1-11", "box outside the picture"),
        ("2-20", "empty box"),
    ]
    assert data.questions[0].box == (60.0, 5.0, 64.0, 25.0)


def test_refcocog_is_umds_and_googles_by_its_name(tmp_path: Path) -> None:
    refs = [reference(1, 7, "val", "by umd"), reference(2, 8, "test", "in the test")]
    write_refer(tmp_path, folder="refcocog", split_by="umd", refs=refs)
    write_refer(
        tmp_path, folder="refcocog", split_by="google", refs=[reference(1, 7, "val", "by google")]
    )
    umd = opened(tmp_path, "refcocog")
    assert (umd.name, umd.questions[0].expression) == ("refcocog", "by umd")
    google = opened(tmp_path, "refcocog-google")
    assert (google.name, google.questions[0].expression) == ("refcocog-google", "by google")


def test_sets_in_one_root_are_told_apart(tmp_path: Path) -> None:
    write_refer(tmp_path)
    write_refer(tmp_path, folder="data/refcoco+", refs=[reference(1, 7, "val", "plus")])
    assert opened(tmp_path, "refcoco").num_expressions == 4
    assert opened(tmp_path, "refcoco+").num_expressions == 1


def test_a_folder_named_after_another_set_is_not_this_one(tmp_path: Path) -> None:
    write_refer(tmp_path, folder="refcoco+")
    with pytest.raises(UsageError, match=r"refcoco is not in this folder.*refs\(unc\)\.p"):
        opened(tmp_path / "refcoco+", "refcoco")


def test_split_it_has_not_got_lists_those_it_has(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no such split: testB; allowed: val, testA"):
        opened(write_refer(tmp_path), split="testB")


def refs_with(**changed: Any) -> list[dict[str, Any]]:
    return [REFS[0], {**REFS[1], **changed}]


@pytest.mark.parametrize(
    ("refs", "said"),
    [
        ({"a": 1}, "a list of references"),
        ([REFS[0], "text"], "reference 1"),
        (refs_with(split=3), "split of an annotation.*reference 1"),
        (refs_with(sentences=None), "sentences of an annotation.*reference 1"),
        (refs_with(sentences=[{"sent_id": 1}]), "reference 1, sentence 0: missing"),
        (refs_with(sentences=[{"sent_id": 1, "sent": 5}]), "sent of an annotation.*sentence 0"),
        (refs_with(ref_id="2"), "ref_id of an annotation.*reference 1"),
        (refs_with(ann_id=999), "annotations of instances.json has not got.*reference 1: 999"),
        (refs_with(image_id=7), "image_id of an annotation.*that of its box, 8"),
        ([REFS[0], REFS[0]], "same id"),
    ],
)
def test_references_that_cannot_be_used_are_named(tmp_path: Path, refs: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        opened(write_refer(tmp_path, refs=refs))


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("annotations", {"bbox": [1, 2, 3]}, "bbox of an annotation.*annotations 0"),
        ("annotations", {"bbox": [1, 2, 3, "4"]}, "bbox of an annotation.*annotations 0"),
        ("annotations", {"id": "x"}, "id of an annotation.*annotations 0"),
        ("images", {"file_name": "../../secret.jpg"}, "file_name of an annotation.*images 0"),
        ("images", {"file_name": "/etc/passwd"}, "file_name of an annotation.*images 0"),
        ("images", {"width": 0}, "width of an annotation.*images 0"),
        ("images", {"height": "48"}, "height of an annotation.*images 0"),
        ("images", {"id": 70}, "images of instances.json has not got.*reference 0: 7"),
    ],
)
def test_instances_that_cannot_be_used_are_named(
    tmp_path: Path, key: str, values: dict[str, Any], said: str
) -> None:
    root = write_refer(tmp_path)
    file = root / "data/refcoco/instances.json"
    plain = json.loads(file.read_text())
    plain[key][0].update(values)
    file.write_text(json.dumps(plain))
    with pytest.raises(UsageError, match=said):
        opened(root)


@pytest.mark.parametrize("raw", ["[]", "{}", '{"annotations": 3, "images": []}', "{"])
def test_instances_of_another_form_are_refused(tmp_path: Path, raw: str) -> None:
    root = write_refer(tmp_path)
    (root / "data/refcoco/instances.json").write_text(raw)
    with pytest.raises(UsageError, match=r"instances\.json"):
        opened(root)


def test_two_boxes_of_one_id_are_refused(tmp_path: Path) -> None:
    root = write_refer(tmp_path)
    (file,) = root.rglob("instances.json")
    plain = json.loads(file.read_text())
    plain["annotations"].append({**plain["annotations"][0], "bbox": [0, 0, 1, 1]})
    file.write_text(json.dumps(plain))
    with pytest.raises(UsageError, match="another one for each entry"):
        opened(root)
