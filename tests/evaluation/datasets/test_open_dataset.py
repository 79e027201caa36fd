from __future__ import annotations

import json
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


def test_two_splits_and_none_named(tmp_path: Path) -> None:
    root = write_refer(tmp_path)
    with pytest.raises(UsageError, match=r"several splits .* allowed: val, testA; .*:val,testA"):
        opened(f"refcoco:{root}")


def test_split_without_a_name_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such split: one without a name; allowed: val, testA"):
        opened(f"refcoco:{write_refer(tmp_path)}:val,")


def test_splits_are_asked_once_and_in_their_order(tmp_path: Path) -> None:
    data = opened(f"refcoco:{write_refer(tmp_path)}:testA,val,testA")
    assert data.splits == ("testA", "val")
    assert [one.split for one in data.questions] == ["testA", "val", "val", "val", "val"]


def test_two_layouts_in_one_root_are_listed(tmp_path: Path) -> None:
    root = write_refer(tmp_path)
    (root / "refcoco_val.json").write_text("[]")
    with pytest.raises(UsageError) as caught:
        opened(f"refcoco:{root}:val")
    assert "refcoco (refer: data/refcoco/refs(unc).p)" in str(caught.value)
    assert "refcoco (per-split JSON: refcoco_val.json)" in str(caught.value)
    assert "give the folder of one of them" in str(caught.value)


def test_two_sets_in_one_folder_are_listed_with_a_way_to_name_one(tmp_path: Path) -> None:
    root = write_refer(tmp_path)
    write_refer(tmp_path, split_by="google")
    with pytest.raises(UsageError, match=rf"refcoco-google \(refer: .*name one, as in .*:{root}"):
        opened(f"{root}:val")


@pytest.mark.parametrize("name", ["refcoco", "refcoco+", "refcocog"])
def test_root_that_is_no_data_set_says_what_was_looked_for(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError) as caught:
        opened(f"{name}:{tmp_path}:val")
    split_by = "umd" if name == "refcocog" else "unc"
    for part in (
        f"{name} is not in this folder",
        str(tmp_path),
        f"refs({split_by}).p beside instances.json",
        f"{name}_<split>.json",
        "<split>-00000-of-00001.parquet",
    ):
        assert part in str(caught.value)


def test_references_without_instances_are_no_data_set(tmp_path: Path) -> None:
    root = write_refer(tmp_path)
    (root / "data/refcoco/instances.json").unlink()
    with pytest.raises(UsageError, match="beside instances"):
        opened(f"refcoco:{root}:val")


def test_folder_that_is_no_data_set_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(UsageError, match=r"holds no data set: .*refs\(unc\|umd.*questions\.jsonl"):
        opened(str(tmp_path))


@pytest.mark.parametrize(
    "spec",
    ["", ":", "refcoco", "refcoco:", "refcoco::val", "refcooc:/data:val", "a\0b", "~nobody/x"],
)
def test_spec_that_names_nothing_lists_what_may_be(spec: str) -> None:
    with pytest.raises(UsageError, match=r"no such data set.*refshapes\[:SPLIT\], refcoco\|"):
        opened(spec)


def test_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([]))
    with pytest.raises(UsageError, match="not a folder"):
        opened(f"{tmp_path / 'a.json'}")


def test_same_data_has_the_same_fingerprint_wherever_it_is(tmp_path: Path) -> None:
    first = opened(f"refcoco:{write_refer(tmp_path / 'a')}:val")
    second = opened(f"refcoco:{write_refer(tmp_path / 'b', folder='refcoco')}:val")
    assert first.fingerprint == second.fingerprint
    assert first.fingerprint != opened(f"refcoco:{tmp_path / 'a'}:val,testA").fingerprint


@pytest.mark.parametrize("spec", ["a" * 5000, f"refcoco:{'a' * 5000}:val", f"{'a' * 300}:val"])
def test_name_that_no_folder_can_have_is_refused(spec: str) -> None:
    with pytest.raises(UsageError, match="no such data set"):
        opened(spec)


@pytest.mark.parametrize("split", ["val 2", "near, far"])
def test_split_of_ones_own_may_have_any_name(tmp_path: Path, split: str) -> None:
    save_image(tmp_path / "a.png")
    lines = [
        {"image": "a.png", "expression": "x", "box": [0, 0, 9, 9], "split": name}
        for name in (split, "other")
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert opened(f"{tmp_path}:{split}").splits == (split,)
