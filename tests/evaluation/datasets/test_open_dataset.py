from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gap_export.errors import UsageError
from gap_export.evaluation.datasets import open_dataset
from gap_export.evaluation.questions import Dataset
from tests.evaluation.datasets.builders import REFS, coco_name, save_image, write_refer


def opened(spec: str) -> Dataset:
    return open_dataset(spec, samples=None, seed=0)


def test_root_may_have_colons(tmp_path: Path) -> None:
    root = write_refer(tmp_path / "a:b")
    assert opened(f"refcoco:{root}:val").num_expressions == 4
    assert opened(f"{root}:testA").num_expressions == 1
    # What exists as it is written is the folder.
    one_split = write_refer(tmp_path / "c:val", refs=REFS[3:])
    assert opened(f"refcoco:{one_split}").splits == ("testA",)


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_refer(tmp_path / "coco")
    assert opened("refcoco:~/coco:val").num_expressions == 4


def test_folder_tells_its_layout(tmp_path: Path) -> None:
    root = write_refer(tmp_path)
    for folder in (root, root / "data"):
        assert (opened(f"{folder}:val").name, opened(f"{folder}:val").layout) == (
            "refcoco",
            "refer",
        )


def test_folder_that_several_names_lead_to_is_one_data_set(tmp_path: Path) -> None:
    write_refer(tmp_path, folder="mine", refs=REFS[:1])
    save_image(tmp_path / "mine" / coco_name(7))
    assert opened(f"{tmp_path / 'mine'}").name == "mine-unc"
    assert opened(f"refcoco:{tmp_path / 'mine'}").name == "refcoco"


def test_folder_in_refers_layout_has_a_name_of_its_own(tmp_path: Path) -> None:
    write_refer(tmp_path, folder="refclef", split_by="berkeley", refs=REFS[:1])
    save_image(tmp_path / "refclef" / coco_name(7))
    assert opened(f"{tmp_path / 'refclef'}:val").name == "refclef-berkeley"


def test_folder_named_refshapes_needs_a_dot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_refer(tmp_path / "refshapes")
    monkeypatch.chdir(tmp_path)
    assert opened("./refshapes:val").layout == "refer"


def test_images_have_absolute_paths_since_workers_are_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_refer(tmp_path / "coco")
    monkeypatch.chdir(tmp_path)
    paths = [one.image.path for one in opened("refcoco:coco:val").questions]
    assert all(path is not None and path.is_absolute() for path in paths)


def test_splits_are_asked_once_and_in_their_order(tmp_path: Path) -> None:
    data = opened(f"refcoco:{write_refer(tmp_path)}:testA,val,testA")
    assert data.splits == ("testA", "val")
    assert [one.split for one in data.questions] == ["testA", "val", "val", "val", "val"]


def test_same_data_has_the_same_fingerprint_wherever_it_is(tmp_path: Path) -> None:
    first = opened(f"refcoco:{write_refer(tmp_path / 'a')}:val")
    second = opened(f"refcoco:{write_refer(tmp_path / 'b', folder='refcoco')}:val")
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != opened(f"refcoco:{tmp_path / 'a'}:val,testA").fingerprint


@pytest.mark.parametrize("split", ["val 2", "near, far"])
def test_split_of_ones_own_may_have_any_name(tmp_path: Path, split: str) -> None:
    save_image(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "expression": "x", "box": [0, 0, 9, 9], "split": name}
        for name in (split, "other")
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert opened(f"{tmp_path}:{split}").splits == (split,)


def two_layouts(folder: Path) -> Path:
    root = write_refer(folder)
    (root / "refcoco_val.json").write_text("[]")
    return root


def two_sets(folder: Path) -> Path:
    write_refer(folder, split_by="google")
    return write_refer(folder)


def no_instances(folder: Path) -> Path:
    root = write_refer(folder)
    (root / "data/refcoco/instances.json").unlink()
    return root


def notes(folder: Path) -> Path:
    (folder / "notes.txt").write_text("nothing")
    return folder


BY_NAME = r"is not in this folder.* beside instances\.json, .*<split>\.json, <split>-00000-of"
UNKNOWN = r"no such data set.*refshapes-2\[:SPLIT\], refcoco\|"


@pytest.mark.parametrize(
    ("make", "spec", "message"),
    [
        (write_refer, "refcoco:{}", "several splits .* allowed: val, testA; .*:val,testA"),
        (write_refer, "refcoco:{}:val,", "no such split: one without a name; allowed: val, testA"),
        (
            two_layouts,
            "refcoco:{}:val",
            r"refcoco \(refer: data/refcoco/refs\(unc\)\.p\).*refcoco \(per-split JSON: refcoco_val"
            ".*give the folder of one of them",
        ),
        (two_sets, "{}:val", r"refcoco-google \(refer: .*name one, as in .*:/"),
        (no_instances, "refcoco:{}:val", "beside instances"),
        (notes, "{}", r"holds no data set: .*refs\(unc\|umd.*questions\.jsonl"),
        (notes, "{}/notes.txt", "not a folder"),
        (notes, "refcoco:{}:val", rf"refcoco {BY_NAME}"),
        (notes, "refcoco+:{}:val", rf"refcoco\+ {BY_NAME}"),
        (notes, "refcocog:{}:val", rf"refcocog {BY_NAME}"),
        *[
            (notes, spec, UNKNOWN)
            for spec in (
                *("", ":", "refcoco", "refcoco:", "refcoco::val", "refcooc:/data:val", "a\0b"),
                *("~nobody/x", "a" * 5000, f"refcoco:{'a' * 5000}:val", f"{'a' * 300}:val"),
            )
        ],
    ],
)
def test_what_names_no_one_data_set_is_refused(
    tmp_path: Path, make: Callable[[Path], Path], spec: str, message: str
) -> None:
    with pytest.raises(UsageError, match=f"(?s){message}"):
        opened(spec.format(make(tmp_path)))
