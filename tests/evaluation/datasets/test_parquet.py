from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gap_export.errors import ImageError, MissingDependencyError, UsageError
from gap_export.evaluation.datasets import open_dataset, parquet_images
from gap_export.evaluation.questions import Dataset, ImageSource
from gap_export.runtime.images.image import load_image

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")


def encoded(shade: int, size: tuple[int, int] = (8, 6)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def entry(number: int, *answers: str, **more: Any) -> dict[str, Any]:
    return {
        "question_id": str(number),
        "image": {"bytes": encoded(number), "path": None},
        "question": "Please describe the region.",
        "answer": list(answers),
        "segmentation": [0.0],
        "bbox": [1.0, 2.0, 3.5, 3.0],
        "iscrowd": 0,
        "file_name": f"COCO_train2014_{number:012d}_{number}.jpg",
        **more,
    }


def write(file: Path, rows: list[dict[str, Any]], rows_per_group: int = 2) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=rows_per_group)
    return file


def opened(spec: str) -> Dataset:
    return open_dataset(spec, samples=None, seed=0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two splits; that of val is in two files, and has two rows about one image."""
    val = [entry(n, f"first {n}", f"second {n}") for n in range(5)]
    again = entry(9, "again", file_name="COCO_train2014_000000000000_77.jpg")
    write(tmp_path / "data/val-00000-of-00002.parquet", val)
    write(tmp_path / "data/val-00001-of-00002.parquet", [again, entry(6, "last")])
    write(tmp_path / "data/testA-00000-of-00001.parquet", [entry(3, "child")])
    return tmp_path


def shade(source: ImageSource) -> int:
    image = load_image(source.load(), pad_color=(0, 0, 0))
    return int(np.asarray(image)[0, 0, 0])


def test_every_answer_is_a_question(root: Path) -> None:
    data = opened(f"refcoco:{root}:val")
    assert (data.name, data.layout, data.splits) == ("refcoco", "parquet", ("val",))
    assert data.num_expressions == 12
    assert [(one.id, one.expression) for one in data.questions[:4]] == [
        ("val-0-0", "first 0"),
        ("val-0-1", "second 0"),
        ("val-5-0", "again"),
        ("val-1-0", "first 1"),
    ]
    assert data.questions[0].box == (1.0, 2.0, 4.5, 5.0)
    assert data.questions[0].image_id == "COCO_train2014_000000000000"


def test_images_are_those_of_their_rows(root: Path) -> None:
    questions = {one.id: one for one in opened(f"refcoco:{root}:val").questions}
    assert [shade(questions[f"val-{n}-0"].image) for n in (4, 0, 2, 6)] == [4, 0, 2, 6]
    # Rows about one image share it.
    assert questions["val-5-0"].image == questions["val-0-0"].image


def test_other_split_is_other_files(root: Path) -> None:
    assert [one.expression for one in opened(f"refcoco:{root}:testA").questions] == ["child"]
    with pytest.raises(UsageError, match="no such split: testB; allowed: testA, val"):
        opened(f"refcoco:{root}:testB")


@pytest.mark.parametrize("folder", ["RefCOCOplus/data", "RefCOCOplus", "data", "."])
def test_files_are_found_where_the_hub_has_them(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder / "val-00000-of-00001.parquet", [entry(1, "a")])
    assert opened(f"refcoco+:{tmp_path}:val").num_expressions == 1


def test_folder_alone_takes_its_own_name(tmp_path: Path) -> None:
    write(tmp_path / "RefCOCOg/data/test.parquet", [entry(1, "a")])
    assert opened(f"{tmp_path / 'RefCOCOg'}").name == "refcocog"


def test_missing_file_of_a_split_is_refused(root: Path) -> None:
    (root / "data/val-00000-of-00002.parquet").unlink()
    with pytest.raises(UsageError, match=r"split val are not complete: val-00001-of-00002"):
        opened(f"refcoco:{root}:val")


def test_opening_reads_no_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a row group was read")

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", refuse)
    assert opened(f"refcoco:{root}:val").num_expressions == 12


def test_row_groups_are_read_once_in_order(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int]] = []
    real = parquet_images.open_parquet

    class Counted:
        def __init__(self, file: Path) -> None:
            self.file, self.opened = file, real(file)

        def __enter__(self) -> Counted:
            return self

        def __exit__(self, *_: object) -> None:
            self.opened.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.opened, name)

        def read_row_group(self, group: int, columns: list[str]) -> Any:
            read.append((self.file.name, group))
            return self.opened.read_row_group(group, columns=columns)

    data = opened(f"refcoco:{root}:val")
    monkeypatch.setattr(parquet_images, "open_parquet", Counted)
    for question in data.questions:
        question.image.load()
    first, second = "val-00000-of-00002.parquet", "val-00001-of-00002.parquet"
    assert read == [(first, 0), (first, 1), (first, 2), (second, 0)]


def test_an_image_has_one_source_and_a_file_is_left_to_the_session(tmp_path: Path) -> None:
    path = tmp_path / "gone.png"
    assert ImageSource(path=path).load() == path
    with pytest.raises(AssertionError):
        ImageSource(path=path, scene=("heldout", 0, 0, 4))
    with pytest.raises(AssertionError):
        ImageSource()


def test_source_is_small_and_can_be_sent(root: Path) -> None:
    source = opened(f"refcoco:{root}:val").questions[3].image
    sent = pickle.dumps(source)
    assert len(sent) < 1000
    assert shade(pickle.loads(sent)) == 1


@pytest.mark.parametrize(
    "content", [{"bytes": None, "path": "a.jpg"}, {"bytes": b"not an image", "path": None}, None]
)
def test_broken_image_is_found_when_loaded(tmp_path: Path, content: Any) -> None:
    write(tmp_path / "val.parquet", [entry(1, "a"), entry(2, "b", image=content)])
    data = opened(f"{tmp_path}:val")
    assert data.num_expressions == 2
    with pytest.raises(ImageError):
        load_image(data.questions[1].image.load(), pad_color=(0, 0, 0))


def test_file_that_is_gone_or_cut_is_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    file = write(tmp_path / "val.parquet", [entry(1, "a")])
    with pytest.raises(ImageError, match="row 5 of 1"):
        ImageSource(parquet=(file, 5)).load()
    other = tmp_path / "other.parquet"
    other.write_bytes(file.read_bytes()[:-20])
    for path in (other, tmp_path / "none.parquet"):
        with pytest.raises(ImageError, match="not a parquet file that can be read"):
            ImageSource(parquet=(path, 0)).load()


@pytest.mark.parametrize("raw", [b"", b"PAR1", b"PAR1" + b"\0" * 50 + b"PAR1"])
def test_file_of_something_else_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "val.parquet").write_bytes(raw)
    with pytest.raises(UsageError, match=r"not a parquet file that can be read.*val\.parquet"):
        opened(f"{tmp_path}:val")


def test_other_columns_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "val.parquet", [{"image": {"bytes": b""}, "caption": "a"}])
    with pytest.raises(UsageError, match="no answer, bbox, file_name; it has image, caption"):
        opened(f"{tmp_path}:val")
    write(tmp_path / "val.parquet", [entry(1, "a", image="a.jpg")])
    with pytest.raises(UsageError, match="no bytes in image"):
        opened(f"{tmp_path}:val")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bbox": [1.0, 2.0]}, "bbox of an annotation.*row 0"),
        ({"bbox": None}, "bbox of an annotation.*row 0"),
        ({"answer": [None]}, "answer of an annotation.*row 0"),
        ({"file_name": 3}, "file_name of an annotation.*row 0"),
    ],
)
def test_row_that_cannot_be_used_is_named(
    tmp_path: Path, values: dict[str, Any], said: str
) -> None:
    write(tmp_path / "val.parquet", [entry(1, "a", **values)])
    with pytest.raises(UsageError, match=said):
        opened(f"{tmp_path}:val")


def test_without_pyarrow_the_extra_is_named(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gap_export.extras._is_installed", lambda _: False)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[refcoco\]"):
        opened(f"refcoco:{root}:val")
