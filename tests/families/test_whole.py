"""One folder under the package's own names: the demo models of families that come in parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import CheckpointError, RecipeError
from gap_export.families import read_source
from gap_export.spec.recipe import find_recipe

DEMOS = ("refshapes-shikra", "refshapes-minigpt-v2")


def copy_of(name: str, folder: Path) -> Path:
    """A demo checkpoint that a test may change."""
    files = ("config.json", "model.safetensors", "tokenizer.json")
    home = find_recipe(name)[1]
    folder.mkdir()
    for file in files:
        shutil.copy(home / file, folder / file)
    return folder


@pytest.mark.parametrize("name", DEMOS)
def test_a_demo_checkpoint_is_read_tensor_by_tensor(name, tmp_path):
    recipe, home = find_recipe(name)
    source = read_source(recipe, Checkpoint.of(copy_of(name, tmp_path / "copy")))
    assert source.layout == "whole"
    assert source.architecture == recipe.architecture
    assert source.eos_token_ids == (recipe.special_tokens["</s>"],)
    stored = load_file(home / "model.safetensors")
    assert stored.keys() == source.weights.keys()
    for key, weight in source.weights.items():
        assert weight.load().equal(stored[key]), key


def test_eva_keys_have_no_bias():
    stored = load_file(find_recipe("refshapes-minigpt-v2")[1] / "model.safetensors")
    biases = [value for key, value in stored.items() if key.endswith("k_proj.bias")]
    assert len(biases) == 4
    assert not any(bias.any() for bias in biases)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("lm_head.weight"), "lm_head.weight"),
        (lambda tensors: tensors.update(extra=tensors["lm_head.weight"].clone()), "extra"),
        (
            lambda tensors: tensors.update(
                {"projector.linear_1.bias": tensors["projector.linear_1.bias"][:-1].clone()}
            ),
            "projector.linear_1.bias",
        ),
    ],
    ids=["missing", "left over", "of another shape"],
)
def test_a_tensor_that_does_not_fit_is_named(change, said, tmp_path):
    folder = copy_of(DEMOS[0], tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=said):
        read_source(find_recipe(DEMOS[0])[0], Checkpoint.of(folder))


def test_another_familys_folder_is_said_to_look_like_it(tmp_path):
    folder = copy_of(DEMOS[0], tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"looks like shikra \(whole\)"):
        read_source(find_recipe(DEMOS[1])[0], Checkpoint.of(folder))


def test_a_family_that_config_json_does_not_say_is_not_guessed(tmp_path):
    folder = copy_of(DEMOS[0], tmp_path / "copy")
    (folder / "config.json").write_text(json.dumps({"model_type": "gap-export"}))
    with pytest.raises(CheckpointError, match="is not a checkpoint of family shikra"):
        read_source(find_recipe(DEMOS[0])[0], Checkpoint.of(folder))


def test_a_recipe_without_sizes_is_refused(tmp_path):
    folder = copy_of(DEMOS[0], tmp_path / "copy")
    recipe = find_recipe(DEMOS[0])[0].model_copy(update={"architecture": None})
    with pytest.raises(RecipeError, match="does not say the model's sizes"):
        read_source(recipe, Checkpoint.of(folder))


@pytest.mark.parametrize("name", DEMOS)
def test_a_checkpoint_of_the_other_demo_is_refused(name, tmp_path):
    (other,) = set(DEMOS) - {name}
    folder = copy_of(other, tmp_path / "copy")
    with pytest.raises(CheckpointError):
        read_source(find_recipe(name)[0], Checkpoint.of(folder))
