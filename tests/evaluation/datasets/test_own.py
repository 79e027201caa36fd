from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gap_export.errors import ImageError, UsageError
from gap_export.evaluation.datasets import open_dataset
from gap_export.evaluation.questions import Dataset
from gap_export.runtime.images.image import load_image
from tests.evaluation.datasets.builders import save_image

ROW = {"image": "images/yard.png", "expression": "the gate", "box": [1, 2, 30, 40]}


def write(folder: Path, *rows: dict[str, Any]) -> Path:
    save_image(folder / "images/yard.png")
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def opened(folder: Path, split: str = "") -> Dataset:
    return open_dataset(f"{folder}{split}", samples=None, seed=0)


def test_line_is_a_question(tmp_path: Path) -> None:
    folder = write(tmp_path / "yards", ROW)
    data = opened(folder)
    assert (data.name, data.layout, data.splits) == ("yards", "questions.jsonl", ("all",))
    (question,) = data.questions
    assert question.id == "0"
    assert question.box == (1.0, 2.0, 30.0, 40.0)
    assert question.image_size == (64, 48)
    assert question.kind is None
    assert question.image.path == folder / "images/yard.png"


def test_kinds_splits_and_ids_are_kept(tmp_path: Path) -> None:
    rows = [
        {**ROW, "id": "a", "split": "day", "kind": "colour"},
        {**ROW, "id": "b", "split": "night"},
    ]
    write(tmp_path, *rows)
    day = opened(tmp_path, ":day")
    assert [(one.id, one.kind, one.split) for one in day.questions] == [("a", "colour", "day")]
    assert opened(tmp_path, ":night,day").splits == ("night", "day")
    with pytest.raises(UsageError, match="several splits and none was named; allowed: day, night"):
        opened(tmp_path)


def test_size_is_that_of_the_upright_image(tmp_path: Path) -> None:
    write(tmp_path, {**ROW, "image": "turned.jpg", "box": [1, 2, 45, 60]})
    image = Image.new("RGB", (64, 48))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    (question,) = opened(tmp_path).questions
    assert question.image_size == (48, 64)
    assert question.box == (1.0, 2.0, 45.0, 60.0)


def test_wrong_boxes_and_missing_images_are_listed(tmp_path: Path) -> None:
    write(
        tmp_path,
        ROW,
        {**ROW, "box": [10, 10, 70, 20]},
        {**ROW, "box": [10, 10, 10, 20]},
        {**ROW, "image": "gone.png"},
    )
    data = opened(tmp_path)
    assert data.num_expressions == 4
    assert [(one.reason, one.detail) for one in data.unusable] == [
        ("box outside the picture", "box 10, 10, 70, 20, image 64x48"),
        ("empty box", "box 10, 10, 10, 20, image 64x48"),
        ("missing picture", "gone.png"),
    ]


@pytest.mark.parametrize("raw", [b"", b"not an image", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"])
def test_broken_image_is_left_to_whoever_loads_it(tmp_path: Path, raw: bytes) -> None:
    write(tmp_path, {**ROW, "image": "broken.png"})
    (tmp_path / "broken.png").write_bytes(raw)
    (question,) = opened(tmp_path).questions
    assert question.image_size is None
    with pytest.raises(ImageError):
        load_image(question.image.load(), pad_color=(0, 0, 0))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({**ROW, "image": "../secret.png"}, "image of an annotation.*line 2"),
        ({**ROW, "image": "/etc/passwd"}, "image of an annotation.*line 2"),
        ({**ROW, "image": 3}, "image of an annotation.*line 2"),
        ({**ROW, "box": [1, 2, 3]}, "box of an annotation.*line 2"),
        ({**ROW, "expression": None}, "expression of an annotation.*line 2"),
        ({**ROW, "kind": 5}, "kind of an annotation.*line 2"),
        ({**ROW, "id": 5}, "id of an annotation.*line 2"),
        ({**ROW, "split": "val"}, "split of an annotation.*line 2.*in every line, or in none"),
        ({**ROW, "bbox": [1, 2, 3, 4]}, "bbox of an annotation.*line 2.*allowed: the keys box"),
        ({**ROW, "id": "0"}, "same id"),
    ],
)
def test_line_that_cannot_be_used_is_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        opened(write(tmp_path, ROW, row))


def test_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    write(tmp_path, ROW)
    with (tmp_path / "questions.jsonl").open("a") as file:
        file.write("\n{'image': 3}\n")
    with pytest.raises(UsageError, match=r"not JSON that can be read: .*questions\.jsonl, line 2"):
        opened(tmp_path)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no expressions"):
        opened(write(tmp_path))
