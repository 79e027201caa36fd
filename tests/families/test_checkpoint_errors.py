"""What can be wrong with a checkpoint, and what its refusal says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gap_export.errors import CheckpointError, ExitCode, RecipeError
from gap_export.families.common.checkpoints.matching import check_config_readable, look_at
from tests.families import reading

LAYER = "language_model.model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def broken(tiny_checkpoint, tmp_path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "broken"))


def build(folder: Path, recipe: Any, pruner: str = "spatial") -> None:
    reading.build(recipe, folder, pruner, 0.3, device="meta")


def refusal(folder: Path, recipe: Any, pruner: str = "spatial") -> str:
    with pytest.raises(CheckpointError) as caught:
        build(folder, recipe, pruner)
    assert caught.value.exit_code == ExitCode.USAGE
    return str(caught.value)


def edit_tensors(folder: Path, change: Callable[[dict[str, Any]], Any], name="model") -> None:
    tensors = load_file(folder / f"{name}.safetensors")
    change(tensors)
    save_file(tensors, folder / f"{name}.safetensors")


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any], name="config.json") -> None:
    plain = json.loads((folder / name).read_text())
    change(plain)
    (folder / name).write_text(json.dumps(plain))


def test_untouched_copy_is_fine(broken, tiny_recipe):
    build(broken, tiny_recipe, "text")


UP = "decoder.layers.1.mlp.up_proj.weight"
ZEROTH = LAYER.replace("1", "0")
ONES = np.ones((64, 33), np.float32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(LAYER), [f"missing {UP}"]),
        # The export never reads it.
        (lambda t: t.pop("vision_tower.post_layernorm.bias"), ["missing tower.post_layernorm"]),
        (lambda t: t.pop("language_model.lm_head.weight"), ["missing lm_head.weight"]),
        (lambda t: t.update({"adapter.weight": ONES}), ["unexpected adapter.weight"]),
        (lambda t: t.update({"image_newline": ONES[0, :32]}), ["unexpected image_newline"]),
        (lambda t: t.update({f"x.{LAYER}": t.pop(LAYER)}), [f"missing {UP}, unexpected x.{LAYER}"]),
        (lambda t: [t.pop(k) for k in list(t) if "layers.1" in k], ["and 20 more"]),
        (
            lambda t: t.update({LAYER: ONES, ZEROTH: ONES[0, :2]}),
            [f"{UP} [64, 33] instead of [64, 32]", "layers.0.mlp.up_proj.weight [2] instead of"],
        ),
        (lambda t: t.update({LAYER: t[LAYER].astype(np.int64)}), ["I64; allowed: F32, F16, BF16"]),
        (lambda t: t.update({LAYER: t[LAYER].astype(np.float64)}), ["not supported: F64"]),
        (
            lambda t: t.update({LAYER.replace("language_model.model", "model.language_model"):
                                t[LAYER]}),
            ["two names for one tensor"],
        ),
    ],
)  # fmt: skip
def test_tensors_that_are_not_the_models_are_named(broken, tiny_recipe, change, says):
    edit_tensors(broken, change)
    message = refusal(broken, tiny_recipe)
    assert all(part in message for part in says), message


def test_tensors_that_hold_no_weight_are_passed_over(broken, tiny_recipe):
    old = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "vision_tower.embeddings.position_ids": np.ones((1, 17), np.int64),
    }
    edit_tensors(broken, lambda t: t.update(old))
    build(broken, tiny_recipe)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("vision_tower.", "vision_tower.vision_model."),
        ("vision_tower.", "model.vision_tower."),
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ],
)
def test_every_layout_of_names_is_read(broken, tiny_recipe, old, new):
    def rename(tensors: dict[str, Any]) -> None:
        for key in [k for k in tensors if k.startswith(old)]:
            tensors[new + key.removeprefix(old)] = tensors.pop(key)

    edit_tensors(broken, rename)
    build(broken, tiny_recipe)


def test_missing_and_empty_folder_are_refused(tmp_path, tiny_recipe):
    message = refusal(tmp_path / "none", tiny_recipe)
    assert "not there" in message and str(tmp_path / "none") in message
    assert "an empty folder" in refusal(tmp_path, tiny_recipe)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("model.safetensors", ["no weights", "model.safetensors.index.json"]),
        ("config.json", ["a folder without config.json", "model.safetensors", "allowed: llava-hf"]),
        ("tokenizer.json", ["tokenizer.json"]),
    ],
)
def test_a_file_that_is_missing_is_named(broken, tiny_recipe, name, says):
    (broken / name).unlink()
    message = refusal(broken, tiny_recipe)
    assert all(part in message for part in (str(broken), *says)), message


@pytest.mark.parametrize("text", ["", "{", "[]", "7", "\xff", "[" * 10**5])
def test_config_that_cannot_be_read_is_said_to_be_damaged(broken, tiny_recipe, text):
    file = broken / "config.json"
    file.write_text(text, encoding="latin-1")
    message = refusal(broken, tiny_recipe)
    assert "damaged" in message and str(file) in message
    with pytest.raises(CheckpointError, match="damaged"):
        check_config_readable(broken)
    assert look_at(broken).startswith(f"config.json that cannot be read: {file}: ")


@pytest.mark.parametrize("text", ['{"model_type": 7}', '{"model_type": []}'])
def test_config_of_no_model_is_refused(broken, tiny_recipe, text):
    (broken / "config.json").write_text(text)
    assert "is not a checkpoint of family llava" in refusal(broken, tiny_recipe)


def test_config_that_is_a_folder_cannot_be_read_and_none_is_fine(tmp_path):
    check_config_readable(tmp_path)
    check_config_readable(tmp_path / "missing")
    (tmp_path / "model.pth").touch()
    check_config_readable(tmp_path / "model.pth")
    (tmp_path / "config.json").mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        check_config_readable(tmp_path)


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "visual_projection.safetensors"]
)
def test_missing_file_of_the_text_tower_matters_to_the_text_pruner_alone(broken, tiny_recipe, name):
    (broken / "clip" / name).unlink()
    assert str(broken / "clip") in refusal(broken, tiny_recipe, "text")
    build(broken, tiny_recipe, "cls")


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_truncated_weights_are_refused(broken, tiny_recipe, size):
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    assert "damaged" in refusal(broken, tiny_recipe)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(model_type="llava_next"), "looks like llava_next (llava-next-hf)"),
        (lambda c: c.update(model_type="llama"), "model_type 'llama'"),
        (lambda c: c.pop("model_type"), "model_type None"),
        (lambda c: c["text_config"].update(model_type="phi"), "decoder model_type"),
        (
            lambda c: c["vision_config"].update(model_type="siglip_vision_model"),
            "vision model_type",
        ),
        (lambda c: c.update(vision_feature_layer=-1), "vision_feature_layer"),
        (lambda c: c.update(vision_feature_select_strategy="full"), "select_strategy"),
        (lambda c: c["vision_config"].update(image_size=64), "image size, visual token grid"),
        (lambda c: c["vision_config"].update(patch_size=4), "visual token grid"),
        (lambda c: c["text_config"].update(attention_bias="yes"), "does not parse"),
        (lambda c: c["text_config"].update(num_hidden_layers=3), "missing decoder.layers.2"),
        (
            lambda c: c["text_config"].update(
                rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
            ),
            "rope_type",
        ),
    ],
)
def test_config_of_another_model_is_refused(broken, tiny_recipe, change, says):
    edit_config(broken, change)
    assert says in refusal(broken, tiny_recipe)


def test_select_layer_that_is_not_there_is_refused(broken, tiny_recipe):
    edit_config(broken, lambda c: c.update(vision_feature_layer=-4))
    recipe = tiny_recipe.model_copy(update={"select_layer": -4})
    assert "no such select layer" in refusal(broken, recipe)


@pytest.mark.parametrize("eos", [None, "two", [], [2, -1], 10_000])
def test_unusable_end_token_is_refused(broken, tiny_recipe, eos):
    edit_config(broken, lambda c: c.update(eos_token_id=eos), "generation_config.json")
    assert "eos_token_id" in refusal(broken, tiny_recipe)


def test_unknown_family_is_refused(tiny_checkpoint, tiny_recipe):
    with pytest.raises(RecipeError, match=r"lava.*allowed: llava"):
        build(tiny_checkpoint, tiny_recipe.model_copy(update={"family": "lava"}))
