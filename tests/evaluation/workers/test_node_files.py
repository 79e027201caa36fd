from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from gap_export.errors import UsageError
from gap_export.evaluation.questions import ImageSource
from gap_export.evaluation.workers import Shard
from gap_export.evaluation.workers.node_files import check_files, files_of
from tests.evaluation.workers.fake_runners import make_question, make_shards


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    """Asks a bundle about an image that is there, one that is not, one in parquet, one drawn."""
    (tmp_path / "bundle").mkdir()
    for name in ("bundle/gap.json", "a.png", "images.parquet"):
        (tmp_path / name).write_bytes(name.encode())
    sources = (
        ImageSource(path=tmp_path / "a.png"),
        ImageSource(path=tmp_path / "missing.png"),
        ImageSource(parquet=(tmp_path / "images.parquet", 3)),
        ImageSource(scene=("heldout", 0, 0, 4)),
    )
    (empty,) = make_shards(1)
    return replace(
        empty,
        setting=replace(empty.setting, bundle=tmp_path / "bundle"),
        questions=tuple(
            make_question(str(index), index, source) for index, source in enumerate(sources)
        ),
    )


def test_a_shard_needs_its_manifest_and_the_images_that_are_there(shard, tmp_path):
    assert files_of(shard) == {
        tmp_path / "bundle/gap.json": hashlib.sha256(b"bundle/gap.json").hexdigest(),
        tmp_path / "a.png": None,
        tmp_path / "images.parquet": None,
    }


def test_a_node_with_the_same_files_will_do(shard):
    check_files(files_of(shard), "far (10.0.0.2)")


@pytest.mark.parametrize("name", ["bundle/gap.json", "a.png", "images.parquet"])
def test_a_node_without_a_file_is_named_with_it(shard, tmp_path, name):
    files = files_of(shard)
    (tmp_path / name).unlink()
    with pytest.raises(UsageError) as caught:
        check_files(files, "far (10.0.0.2)")
    assert "the node far (10.0.0.2) lacks a file" in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_node_with_another_bundle_under_the_path_is_refused(shard, tmp_path):
    files = files_of(shard)
    (tmp_path / "bundle/gap.json").write_text("another")
    with pytest.raises(
        UsageError, match=r"the node far .* has a different file under the same path"
    ):
        check_files(files, "far (10.0.0.2)")
