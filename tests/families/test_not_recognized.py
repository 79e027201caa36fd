"""A main part that is in none of a family's layouts: what it looks like, and what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gap_export.checkpoint.find.source import Checkpoint, resolve_model
from gap_export.errors import CheckpointError
from gap_export.families import read_source
from gap_export.spec.recipe import find_recipe, load_recipe
from tests.families.tiny_minigpt_v2 import minigpt_recipe, write_trained

NAME = "minigptv2_checkpoint.pth"


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """As much of a MiniGPT-v2 as it is recognized by, in a folder of its own."""
    folder = tmp_path / "mini"
    folder.mkdir()
    return write_trained(folder / NAME, {"llama_proj.weight": torch.zeros(1, 1)})


def refusal(recipe, main: Path) -> str:
    with pytest.raises(CheckpointError, match="is not a checkpoint of family") as caught:
        read_source(recipe, Checkpoint.of(main))
    return str(caught.value)


def test_a_file_of_another_family_is_said_to_look_like_it(trained, tiny_checkpoint):
    looks = "looks like minigpt_v2 (minigpt-v2)"
    for recipe in (load_recipe(tiny_checkpoint / "recipe.yaml"), find_recipe("shikra")[0]):
        assert f"it {looks}" in refusal(recipe, trained)
        assert f"{trained} {looks}" in refusal(recipe, trained.parent)


def test_a_folder_of_another_family_is_said_to_look_like_it(tiny_checkpoint, tmp_path):
    _, checkpoint = resolve_model(
        "minigpt-v2", parts={"main": tiny_checkpoint, "base": tmp_path, "tower": file_in(tmp_path)}
    )
    text = refusal(minigpt_recipe(), checkpoint.main)
    assert "it looks like llava (llava-hf)" in text
    assert f"the file {NAME}, or its folder" in text


def file_in(folder: Path) -> Path:
    path = folder / "eva_vit_g.pth"
    path.touch()
    return path


def test_the_file_or_folder_that_was_meant_is_named(trained, tiny_checkpoint):
    renamed = trained.rename(trained.with_name("stage3.pth"))
    assert f"name what is one: {renamed} " in refusal(minigpt_recipe(), renamed.parent)
    llava = load_recipe(tiny_checkpoint / "recipe.yaml")
    text = refusal(llava, tiny_checkpoint / "model.safetensors")
    assert f"name what is one: {tiny_checkpoint} " in text


def test_files_beside_a_config_do_not_stand_alone(tmp_path):
    # What a trainer leaves there is a pickle that is not read.
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "training_args.bin").write_bytes(b"junk")
    text = refusal(minigpt_recipe(), tmp_path)
    assert "model_type 'llama'" in text
    assert "looks like" not in text


def test_an_empty_folder_is_called_so(tmp_path):
    assert "an empty folder" in refusal(minigpt_recipe(), tmp_path)
