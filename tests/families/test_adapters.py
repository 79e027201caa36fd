"""An adapter in a checkpoint's folder: applied as ``from_pretrained`` does, or refused."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gap_export.errors import CheckpointError
from gap_export.spec.recipe import Recipe
from tests.families import reading
from tests.families.llava_layouts import (
    make_adapters,
    take_apart,
    with_parts,
    write_base,
    write_clip,
    write_json,
    write_lora,
    write_original,
)
from tests.families.test_llava_original import assert_all_logits_equal
from tests.families.test_whole import copy_of
from tests.families.tiny_minigpt_v2 import make_minigpt, minigpt_recipe
from tests.families.tiny_minigpt_v2 import write_parts as write_minigpt_parts
from tests.families.tiny_shikra import make_shikra, shikra_recipe
from tests.families.tiny_shikra import write_parts as write_shikra_parts

CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
# What transformers 4.x calls the modules of transformers 5.
OLD_NAMES = (("model.language_model.", "language_model.model."), ("model.", ""))


def build(folder: Path, recipe: Recipe | None = None, device: Any = "meta", **parts: Path) -> Any:
    return reading.build(recipe, {"main": folder, **parts}, device=device)


def adapt(model: Any, config: dict[str, Any]) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model with random adapters added by plain torch, and the file peft saves of them."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(9)
    tensors: dict[str, torch.Tensor] = {}
    targets, saved = config["target_modules"], config.get("modules_to_save") or []
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if any(f".{end}." in f".{name}." for end in saved):
            for key, parameter in module.named_parameters(recurse=False):
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
                tensors[f"base_model.model.{name}.{key}"] = parameter.data
        elif isinstance(module, torch.nn.Linear) and (
            re.fullmatch(targets, name) if isinstance(targets, str) else last in targets
        ):
            rank = config.get("rank_pattern", {}).get(last, config["r"])
            alpha = config.get("alpha_pattern", {}).get(last, config["lora_alpha"])
            scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
            down = torch.randn(rank, module.in_features, generator=generator) * 0.3
            up = torch.randn(module.out_features, rank, generator=generator) * 0.3
            module.weight.data = module.weight.data + scale * (up @ down)
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
    return model, tensors


def put_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    write_json(folder / "adapter_config.json", config)
    save_file({key: t.clone() for key, t in tensors.items()}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("changes", "old_names"),
    [
        # The tower has layers of these names as well.
        ({}, False),
        ({}, True),
        (
            {
                "target_modules": ["q_proj", "fc1", "linear_2"],
                "use_rslora": True,
                "rank_pattern": {"q_proj": 2},
                "alpha_pattern": {"fc1": 5},
            },
            False,
        ),
        (
            {
                "target_modules": r".*language_model.*\.(q_proj|up_proj)",
                "modules_to_save": ["multi_modal_projector", "embed_tokens"],
            },
            False,
        ),
        ({"target_modules": ["lm_head", "q_proj"], "bias": "none", "use_dora": False}, False),
    ],
)
def test_adapter_beside_a_whole_model_is_applied(
    tmp_path, tiny_checkpoint, theirs, changes, old_names
):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "m")
    config = {**CONFIG, **changes}
    model, tensors = adapt(theirs, config)
    for new, old in OLD_NAMES if old_names else ():
        tensors = {
            key.replace(f"base_model.model.{new}", f"base_model.model.{old}"): tensor
            for key, tensor in tensors.items()
        }
    put_adapter(folder, config, tensors)
    reference = build(folder, device="cpu")
    assert_all_logits_equal(reference, model, atol=1e-4)
    with pytest.raises(AssertionError, match="assert"):
        assert_all_logits_equal(reference, theirs, atol=1e-2)
    read = {file.name for _, file in reference.checkpoint_files}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= read
    assert len(reference.notes) == 1 and "LoRA of rank 4" in reference.notes[0]


def test_adapter_beside_a_whole_model_of_the_original_layout_is_applied(
    tmp_path, tiny_recipe, theirs
):
    pieces = take_apart(theirs)
    adapters = make_adapters(pieces, rank=4)
    folder = write_lora(tmp_path / "m", pieces, adapters)
    (folder / "non_lora_trainables.bin").unlink()
    write_original(folder, pieces, tower_inside=False)
    clip = write_clip(tmp_path / "clip", pieces)
    reference = build(folder, with_parts(tiny_recipe), device="cpu", tower=clip)
    model = copy.deepcopy(theirs)
    for name, module in model.model.language_model.named_modules():
        if f"model.{name}.A" in adapters:
            up, down = adapters[f"model.{name}.B"], adapters[f"model.{name}.A"]
            module.weight.data = module.weight.data + 2.0 * (up @ down)
    assert_all_logits_equal(reference, model, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "peft_type cannot be used"),
        ({"use_dora": True}, "use_dora cannot be used"),
        ({"bias": "lora_only"}, "bias cannot be used"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices cannot be used"),
        ({"rank_pattern": {"(a+)+": 2}}, "rank_pattern cannot be used"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern cannot be used"),
        ({"target_modules": ["q_proj"]}, "unexpected decoder.layers.0.self_attn.v_proj"),
        ({"target_modules": ["q_proj", "v_proj", "fc2"]}, "missing adapters for tower.encoder"),
        ({"modules_to_save": ["lm_head"]}, "missing modules_to_save lm_head"),
        ({"rank_pattern": {"v_proj": 2}}, "instead of [2, 32]"),
    ],
)
def test_adapter_that_does_not_fit_is_refused(tmp_path, tiny_checkpoint, theirs, changes, said):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "m")
    put_adapter(folder, {**CONFIG, **changes}, adapt(theirs, CONFIG)[1])
    with pytest.raises(CheckpointError, match=re.escape(said)):
        build(folder)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("adapter_config.json", "no adapter weights"),
        ("adapter_model.safetensors", "without its adapter_config.json"),
        ("adapter_model.bin", "without its adapter_config.json"),
    ],
)
def test_half_an_adapter_is_refused(tmp_path, tiny_checkpoint, name, said):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "m")
    (folder / name).write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match=said):
        build(folder)


def made_whole(tmp_path: Path, tiny_recipe: Recipe, theirs: Any) -> tuple[Recipe, dict[str, Path]]:
    from gap_export.spec.recipe import find_recipe

    name = "refshapes-minigpt-v2"
    return find_recipe(name)[0], {"main": copy_of(name, tmp_path / "m")}


def made_shikra(tmp_path: Path, tiny_recipe: Recipe, theirs: Any) -> Any:
    return shikra_recipe(), write_shikra_parts(tmp_path, make_shikra())


def made_minigpt(tmp_path: Path, tiny_recipe: Recipe, theirs: Any) -> Any:
    return minigpt_recipe(), write_minigpt_parts(tmp_path, make_minigpt())


def made_lora(tmp_path: Path, tiny_recipe: Recipe, theirs: Any) -> Any:
    pieces = take_apart(theirs)
    return with_parts(tiny_recipe), {
        "main": write_lora(tmp_path / "m", pieces, make_adapters(pieces, rank=4)),
        "base": write_base(tmp_path / "base", pieces),
        "tower": write_clip(tmp_path / "clip", pieces),
    }


@pytest.mark.parametrize(
    ("make", "role"),
    [
        (made_whole, "main"),
        (made_shikra, "main"),
        (made_shikra, "base"),
        (made_shikra, "tower"),
        (made_minigpt, "main"),
        (made_minigpt, "base"),
        (made_lora, "base"),
        (made_lora, "tower"),
    ],
)
def test_adapter_that_nothing_applies_is_refused(tmp_path, tiny_recipe, theirs, make, role):
    recipe, parts = make(tmp_path, tiny_recipe, theirs)
    build(parts["main"], recipe, **{k: v for k, v in parts.items() if k != "main"})
    place = parts[role] if parts[role].is_dir() else parts[role].parent
    put_adapter(place, CONFIG, {"base_model.model.x.lora_A.weight": torch.ones(4, 4)})
    with pytest.raises(CheckpointError, match=r"layout that adapters are not applied to.*merge_an"):
        build(parts["main"], recipe, **{k: v for k, v in parts.items() if k != "main"})


def test_files_that_look_like_weights_and_were_not_read_are_listed(tmp_path, tiny_checkpoint):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "m")
    assert build(folder).notes == ()
    listed = ("consolidated.safetensors", "model.gguf", "non_lora_trainables.bin")
    silent = ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "merges.txt", "image.png")
    for name in (*listed, *silent):
        (folder / name).write_bytes(b"")
    (folder / "checkpoint-500").mkdir()
    (folder / "checkpoint-500" / "model.safetensors").write_bytes(b"")
    (note,) = build(folder).notes
    assert note.endswith(f"were not read: {', '.join(listed)}") and str(folder) in note
