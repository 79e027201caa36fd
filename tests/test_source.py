"""What a MODEL argument means, and whether a checkpoint is the one a bundle came from."""

from __future__ import annotations

import shutil

import pytest

from gap_export.bundle import open_bundle
from gap_export.errors import CheckpointError, UnknownModelError
from gap_export.source import resolve_model, resolve_source


def test_a_folder_with_a_recipe_is_a_model(tiny_checkpoint):
    recipe, folder = resolve_model(str(tiny_checkpoint))
    assert recipe.name == "tiny-llava"
    assert folder == tiny_checkpoint


def test_a_bundled_name_is_a_model():
    recipe, folder = resolve_model("refshapes-llava")
    assert folder.name == recipe.name == "refshapes-llava"


def test_a_folder_without_recipe_needs_one_by_name(tmp_path):
    with pytest.raises(CheckpointError, match="--recipe"):
        resolve_model(str(tmp_path))
    recipe, folder = resolve_model(str(tmp_path), "refshapes-llava")
    assert (recipe.name, folder) == ("refshapes-llava", tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not found"):
        resolve_model(str(tmp_path / "nowhere"))


def test_an_unknown_name_is_refused():
    with pytest.raises(UnknownModelError):
        resolve_model("no-such-model")


@pytest.mark.parametrize("name", ["", " ", "a\0b", "a" * 300, "a/" * 4000])
def test_a_name_that_no_file_can_have_is_unknown(name):
    with pytest.raises(UnknownModelError) as caught:
        resolve_model(name)
    assert len(str(caught.value)) < 1000


def test_a_path_that_no_folder_can_have_is_refused():
    with pytest.raises(CheckpointError, match="not found"):
        resolve_model("./" + "a" * 300)


def test_the_home_of_nobody_is_refused():
    with pytest.raises(CheckpointError, match=r"home folder.*~nosuchuser/x"):
        resolve_model("~nosuchuser/x")


def test_a_folder_named_as_a_recipe_is_meant_by_its_path(tiny_checkpoint, tmp_path, monkeypatch):
    folder = tmp_path / "refshapes-llava"
    folder.mkdir()
    shutil.copy(tiny_checkpoint / "recipe.yaml", folder)
    monkeypatch.chdir(tmp_path)
    assert resolve_model("refshapes-llava")[0].name == "refshapes-llava"
    for path in ("./refshapes-llava", str(folder)):
        assert resolve_model(path)[0].name == "tiny-llava"


def test_source_is_found_where_the_manifest_says(tiny_bundle, tiny_checkpoint):
    manifest = open_bundle(tiny_bundle).manifest
    recipe, folder = resolve_source(manifest, None)
    assert (recipe.name, folder) == ("tiny-llava", tiny_checkpoint.resolve())


def test_a_checkpoint_with_a_changed_byte_is_not_the_source(tiny_bundle, tiny_checkpoint, tmp_path):
    manifest = open_bundle(tiny_bundle).manifest
    copy = tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, copy)
    assert resolve_source(manifest, copy)[1] == copy
    weights = copy / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(CheckpointError, match="not the checkpoint"):
        resolve_source(manifest, copy)


def test_an_absent_checkpoint_is_refused_with_the_flag_to_use(tiny_bundle, tmp_path):
    manifest = open_bundle(tiny_bundle).manifest
    with pytest.raises(CheckpointError, match="--checkpoint"):
        resolve_source(manifest, tmp_path / "nowhere")
