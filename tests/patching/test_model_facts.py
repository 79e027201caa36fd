"""What configs say, and which recipe fits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gap_export.errors import CheckpointError, UsageError
from gap_export.patching.model_facts import ModelFacts, choose_recipe, read_facts

CONFIG = {
    "model_type": "llava",
    "image_token_index": 32000,
    "vision_feature_select_strategy": "default",
    "vision_config": {"image_size": 336, "patch_size": 14},
    "text_config": {"vocab_size": 32064, "max_position_embeddings": 4096, "eos_token_id": 2},
}
SIZES_7B = {"hidden_size": 4096, "num_layers": 32, "num_key_value_heads": 32, "head_dim": 128}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path)


def write(folder: Path, name: str = "config.json", **changes) -> Path:
    plain = {**CONFIG, **changes} if name == "config.json" else changes
    (folder / name).write_text(json.dumps(plain))
    return folder


def test_facts_of_a_config_are_read(folder):
    write(folder, "preprocessor_config.json", image_mean=[0.4, 0.5, 0.6], image_std=[0.1, 1, 1])
    facts = read_facts(folder)
    assert (facts.num_visual_tokens, facts.image_size) == (576, 336)
    assert (facts.image_token_id, facts.has_tiles) == (32000, False)
    assert (facts.vocab_size, facts.max_position_embeddings) == (32064, 4096)
    assert facts.hidden_size is None
    assert (facts.mean, facts.std) == ((0.4, 0.5, 0.6), (0.1, 1.0, 1.0))


@pytest.mark.parametrize(("eos", "wanted"), [(7, (7,)), ([7, 9], (7, 9)), (None, ())])
def test_generation_config_has_the_last_word_on_ends(folder, eos, wanted):
    write(folder, "generation_config.json", eos_token_id=eos)
    assert read_facts(folder).eos_token_ids == wanted


def test_what_is_left_out_is_open(tmp_path):
    facts = read_facts(write(tmp_path, vision_config={}, text_config={}, image_token_index=None))
    assert facts.num_visual_tokens is None and facts.image_token_id is None
    assert facts.eos_token_ids == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": None}, "no vision_config"),
        ({"text_config": []}, "no text_config"),
        ({"vision_config": {"image_size": "336"}}, "image_size is not a sensible value"),
        ({"vision_config": {"patch_size": 0}}, "patch_size is not a sensible value"),
        ({"image_token_index": -1}, "image_token_index is not a sensible value"),
        ({"text_config": {"eos_token_id": ["</s>"]}}, "eos_token_id is not a sensible value"),
    ],
    ids=str,
)
def test_a_config_of_wrong_types_is_refused(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        read_facts(write(tmp_path, **changes))


@pytest.mark.parametrize("mean", [[0.1, 0.2], "0.5", [True, 1, 1]])
def test_means_must_be_three_numbers(folder, mean):
    write(folder, "preprocessor_config.json", image_mean=mean)
    with pytest.raises(CheckpointError, match="image_mean"):
        read_facts(folder)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b" " * (5 << 20)])
def test_a_damaged_config_is_refused(tmp_path, raw):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_facts(tmp_path)
    (tmp_path / "config.json").write_bytes(raw)
    with pytest.raises(CheckpointError):
        read_facts(tmp_path)


def test_the_one_recipe_of_these_sizes_is_chosen(folder):
    facts = read_facts(folder)
    assert choose_recipe(folder, facts, SIZES_7B, name=None).name == "llava-1.5-7b"
    larger = {**SIZES_7B, "hidden_size": 5120, "num_layers": 40, "num_key_value_heads": 40}
    assert choose_recipe(folder, facts, larger, name=None).name == "llava-1.5-13b"


@pytest.mark.parametrize(
    ("kind", "name"), [("qwen2_vl", "qwen2-vl-7b"), ("qwen2_5_vl", "qwen2.5-vl-7b")]
)
def test_models_with_one_decoder_are_told_apart_by_their_type(tmp_path, kind, name):
    """The first configs of Qwen2-VL are flat."""
    vision = {"patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
    plain = {"model_type": kind, "hidden_size": 3584, "eos_token_id": 7, "vision_config": vision}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    facts = read_facts(tmp_path)
    assert (facts.hidden_size, facts.eos_token_ids) == (3584, (7,))
    assert (facts.patch_size, facts.frames_per_patch, facts.patches_per_side) == (14, 2, 2)
    sizes = {"hidden_size": 3584, "num_layers": 28, "num_key_value_heads": 4, "head_dim": 128}
    assert choose_recipe(tmp_path, facts, sizes, name=None).name == name


def test_several_recipes_and_none_are_refused(folder):
    everything_open = ModelFacts(
        num_visual_tokens=None, image_size=None, has_tiles=False,
        image_token_id=None, max_position_embeddings=None, vocab_size=None, hidden_size=None,
        eos_token_ids=(), mean=None, std=None,
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"llava-1\.5-7b, .*refshapes-llava.*--recipe NAME"):
        choose_recipe(folder, everything_open, {}, name=None)
    with pytest.raises(UsageError, match=r"no recipe of these sizes; write a recipe\.yaml"):
        choose_recipe(folder, read_facts(folder), {**SIZES_7B, "num_layers": 31}, name=None)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llava", {"num_visual_tokens": 256}, "visual tokens 256; allowed: visual tokens 576"),
        ("llava", {"has_tiles": True}, "tiles True"),
        ("llava", {"mean": (0.5, 0.5, 0.5)}, r"image_mean \[0.5, 0.5, 0.5\]"),
        ("llava-next", {}, "cut into tiles, which is not patched"),
    ],
    ids=str,
)
def test_a_recipe_that_does_not_fit_is_refused(folder, name, changes, message):
    facts = replace(read_facts(folder), **changes)
    with pytest.raises(UsageError, match=message):
        choose_recipe(folder, facts, SIZES_7B, name=name)
