"""InternVL's checkpoints in both forms: the same tensors, true sizes, and what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.checkpoint.weights import TensorRef
from gap_export.families import build_reference, read_source, resolve_pruning
from gap_export.families.common.reference import ModelSource
from gap_export.spec.recipe import find_recipe, load_recipe
from gap_export.spec.requests import PruningRequest
from tests.families import rewriting
from tests.families.reading import refusal, write_empty
from tests.families.tiny_internvl import Form, original_config, special_tokens, write_internvl

KEYS = Path(__file__).parent / "keys"
EditConfig = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def both(request: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[Form, Path]:
    """One model in either form. Read only."""
    root = tmp_path_factory.mktemp("layouts")
    folders: dict[Form, Path] = {"hf": root / "hf", "original": root / "original"}
    for form, folder in folders.items():
        write_internvl(folder, form=form, decoder=request.param)
    return folders


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "c"
    write_internvl(folder, form="original")
    return folder


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "c"
    write_internvl(folder, form="hf", decoder="qwen3")
    return folder


def source_of(folder: Path) -> ModelSource:
    return read_source(load_recipe(folder / "recipe.yaml"), Checkpoint.of(folder))


def test_both_forms_give_the_same_tensors_and_facts(both: dict[Form, Path]):
    ours, theirs = source_of(both["original"]), source_of(both["hf"])
    assert (ours.layout, theirs.layout) == ("internvl-original", "internvl-hf")
    assert ours.weights.keys() == theirs.weights.keys()
    for key, weight in ours.weights.items():
        assert torch.equal(weight.load(), theirs.weights[key].load()), key
    # An answer ends with a chat's token, whatever the language model's own config says.
    end = (special_tokens()["<|im_end|>"],)
    for name in ("architecture", "dtype", "image_token_id"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.eos_token_ids == theirs.eos_token_ids == end
    assert ours.image_token_id == special_tokens()["<IMG_CONTEXT>"]
    assert not torch.equal(
        ours.weights["lm_head.weight"].load(), ours.weights["decoder.embed_tokens.weight"].load()
    )


def test_nothing_is_computed_or_copied(both: dict[Form, Path]):
    weights = source_of(both["original"]).weights
    assert all(isinstance(weight, TensorRef) for weight in weights.values())
    stem = "tower.encoder.layers.1.self_attn"
    parts = [weights[f"{stem}.{part}_proj.weight"] for part in "qkv"]
    assert len({part.file for part in parts}) == 1
    step = parts[0].length
    assert [part.offset - parts[0].offset for part in parts] == [0, step, 2 * step]


def test_names_of_modules_are_read_as_well(hf: Path, tmp_path: Path):
    def prefixed(tensors: rewriting.Tensors) -> rewriting.Tensors:
        names = {key: "model." + re.sub(r"^language_model\.model", "language_model", key)
                 for key in tensors}  # fmt: skip
        names["language_model.lm_head.weight"] = "lm_head.weight"
        return {names[key]: tensor for key, tensor in tensors.items()}

    renamed = rewriting.rewrite(hf, tmp_path / "c", prefixed)
    ours, theirs = source_of(renamed), source_of(hf)
    assert all(torch.equal(ours.weights[k].load(), v.load()) for k, v in theirs.weights.items())


def test_a_head_that_is_the_embeddings_may_be_left_out_where_the_config_says_so(
    hf: Path, tmp_path: Path
):
    def drop(tensors: rewriting.Tensors) -> rewriting.Tensors:
        return {key: value for key, value in tensors.items() if "lm_head" not in key}

    folder = rewriting.rewrite(hf, tmp_path / "c", drop)
    recipe = load_recipe(folder / "recipe.yaml")
    assert "missing lm_head.weight" in refusal(recipe, folder)
    edit(folder, lambda plain: plain.pop("tie_word_embeddings"))  # true by default
    source = source_of(folder)
    assert source.weights["lm_head.weight"] is source.weights["decoder.embed_tokens.weight"]
    # Where both are there, both are taken.
    whole = shutil.copytree(hf, tmp_path / "whole")
    edit(whole, lambda plain: plain.pop("tie_word_embeddings"))
    assert source_of(whole).weights["lm_head.weight"] != source.weights["lm_head.weight"]


def listed_keys(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a file, ``{0..23}`` being each of these numbers."""
    for line in (KEYS / f"{name}.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        key, *sizes = line.split()
        layers = re.search(r"\{(\d+)\.\.(\d+)\}", key)
        numbers = range(int(layers[1]), int(layers[2]) + 1) if layers else [0]
        for number in numbers:
            yield re.sub(r"\{.*\}", str(number), key), tuple(map(int, sizes))


# The one that gives a config its sizes, and whether it is in transformers' form.
PUBLISHED = {
    "internvl3-1b": ("internvl3-1b", False),
    "internvl3-1b-hf": ("internvl3-1b", True),
    "internvl3.5-8b": ("internvl3.5-8b", False),
    "internvl3.5-4b-hf": ("internvl3.5-4b", True),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_and_shapes_are_read_at_true_size(name: str, tmp_path: Path):
    recipe_name, is_hf = PUBLISHED[name]
    recipe, keys = find_recipe(recipe_name)[0], dict(listed_keys(name))
    if name == "internvl3.5-8b":
        assert 2 * sum(map(math.prod, keys.values())) == 17_056_636_928
    write_empty(tmp_path / "model.safetensors", keys)
    config = published_config(recipe)
    (tmp_path / "config.json").write_text(json.dumps(config if is_hf else original_config(config)))
    vocabulary = recipe.architecture.decoder.vocab_size  # type: ignore[union-attr]
    write_tokenizer(tmp_path, dict(recipe.special_tokens), vocabulary)
    source = read_source(recipe, Checkpoint.of(tmp_path))
    assert source.dtype == "bfloat16"
    pruning = resolve_pruning(recipe, PruningRequest(pruner=None, keep_ratio=0.3, order="raster"))
    reference = build_reference(recipe, Checkpoint.of(tmp_path), pruning, device="meta")
    assert reference.decoder_spec.eos_token_ids == (151645,)
    assert len(source.weights) == len(keys) + (0 if is_hf else 24 * 2 * 2)


def write_tokenizer(folder: Path, special: dict[str, int], vocab_size: int) -> None:
    from gap_export.families.common.checkpoints.random_weights import stand_in_tokenizer

    (folder / "tokenizer.json").write_bytes(stand_in_tokenizer(vocab_size, special))


def published_config(recipe: Any) -> dict[str, Any]:
    """What transformers' config.json says of a recipe's sizes."""
    from transformers import InternVLConfig

    shape = recipe.architecture.decoder
    kind = "qwen3" if shape.qk_norm else "qwen2"
    scaling = {"rope_type": "default"} if shape.qk_norm else {"rope_type": "dynamic", "factor": 2.0}
    text = {
        "model_type": kind,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_parameters": {**scaling, "rope_theta": 1e6},
        "tie_word_embeddings": False,
        **({"head_dim": 128} if shape.qk_norm else {}),
    }
    config = InternVLConfig(
        vision_config={"attention_bias": True},
        text_config=text,
        image_token_id=recipe.special_tokens["<IMG_CONTEXT>"],
        tie_word_embeddings=False,
    )
    plain: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return plain


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    plain = json.loads((folder / "config.json").read_text())
    change(plain)
    (folder / "config.json").write_text(json.dumps(plain))


def setting(path: str, value: Any) -> EditConfig:
    """Sets a key, ``part.key`` within a part; None as value removes it."""

    def change(plain: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            plain = plain[parent]
        if value is None:
            del plain[last]
        else:
            plain[last] = value

    return change


SIX_B = r"norm_type.*rms_norm.*InternViT-300M; InternViT-6B is not implemented"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (setting("ps_version", "v1"), r"ps_version.*v1.*allowed: v2"),
        (setting("ps_version", None), r"ps_version.*v1.*allowed: v2"),  # the class's default
        (setting("downsample_ratio", 0.25), r"downsample_ratio.*0\.25.*0\.5"),
        (setting("select_layer", -2), r"vision_feature_layer.*-2.*allowed: -1"),
        (setting("pad2square", True), r"pad2square.*True"),
        (setting("use_thumbnail", False), r"use_thumbnail.*True: a thumbnail behind the tiles"),
        (setting("force_image_size", 224), r"force_image_size.*224.*allowed: 32"),
        (setting("vision_config.norm_type", "rms_norm"), SIX_B),
        (setting("vision_config.norm_type", None), SIX_B),
        (setting("vision_config.qk_normalization", True), "InternViT-6B is not implemented"),
        (setting("vision_config.qkv_bias", False), "InternViT-6B is not implemented"),
        (setting("vision_config", 7), r"vision_config.*7"),
        (setting("llm_config", None), r"llm_config.*None"),
        (setting("llm_config.model_type", "internlm2"), r"language model_type.*internlm2.*qwen2"),
        (
            setting("llm_config.rope_scaling", {"type": "yarn", "factor": 4.0}),
            r"rope_type.*yarn.*default or dynamic",
        ),
        (
            setting(
                "llm_config.rope_scaling", {"type": "yarn", "rope_type": "dynamic", "factor": 2.0}
            ),
            r"type cannot be used: 'yarn'",
        ),
        (
            setting("llm_config.rope_scaling", {"type": "linear", "factor": 4.0}),
            r"rope_type.*linear.*default or dynamic",
        ),
        (setting("vision_config.image_size", [32, 64]), r"image_size.*two equal numbers"),
        (setting("vision_config.hidden_size", 10**9), r"vision_config\.hidden_size"),
        (setting("vision_config.num_hidden_layers", 10**6), r"num_hidden_layers"),
    ],
)
def test_original_config_of_another_model_is_refused(
    original: Path, tmp_path: Path, change: EditConfig, says: str
):
    folder = shutil.copytree(original, tmp_path / "c")
    edit(folder, change)
    assert re.search(says, refusal(load_recipe(folder / "recipe.yaml"), folder))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (setting("downsample_ratio", 0.25), r"downsample_ratio"),
        (setting("vision_feature_layer", -2), r"vision_feature_layer.*-2"),
        (setting("vision_feature_layer", [-1, -5]), r"vision_feature_layer"),
        (setting("vision_feature_select_strategy", "full"), r"select_strategy.*full.*CLS left out"),
        (setting("image_token_id", 4), r"image_token_id.*4"),
        (setting("vision_config.use_qk_norm", True), "InternViT-6B is not implemented"),
        (setting("vision_config.use_mean_pooling", False), r"no norm behind the tower"),
        (setting("vision_config.image_size", [32, 64]), r"image_size.*two equal numbers"),
        (setting("vision_config.patch_size", [4, 4, 4]), r"patch_size.*two equal numbers"),
        (setting("vision_config.patch_size", 8), r"grid|shape"),
        (setting("text_config.model_type", "llama"), r"language model_type.*llama"),
        (setting("text_config.sliding_window", 16), r"sliding_window|does not parse"),
    ],
)
def test_config_in_transformers_form_of_another_model_is_refused(
    hf: Path, tmp_path: Path, change: EditConfig, says: str
):
    folder = shutil.copytree(hf, tmp_path / "c")
    edit(folder, change)
    if "sliding_window" in says:
        edit(folder, setting("text_config.use_sliding_window", True))
    assert re.search(says, refusal(load_recipe(folder / "recipe.yaml"), folder))


def test_one_number_for_a_side_is_as_good_as_two(hf: Path, tmp_path: Path):
    folder = shutil.copytree(hf, tmp_path / "c")
    edit(folder, setting("vision_config.image_size", 32))
    assert source_of(folder).architecture == source_of(hf).architecture


@pytest.mark.parametrize("key", ["mlp2.0.weight", "gating_mlp.weight"])
def test_a_flash_variant_is_refused_by_its_name(original: Path, tmp_path: Path, key: str):
    def more(tensors: rewriting.Tensors) -> rewriting.Tensors:
        return tensors | {key: torch.zeros(4)}

    folder = rewriting.rewrite(original, tmp_path / "c", more)
    says = refusal(load_recipe(folder / "recipe.yaml"), folder)
    assert key in says and "-Flash variants" in says


def test_rope_stays_plain_up_to_the_last_id():
    """Dynamic scaling begins beyond the context, which no id of a session reaches."""
    from transformers import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512}
    rotary = Qwen2RotaryEmbedding(Qwen2Config(**sizes, rope_parameters=rope))
    plain = rotary.inv_freq.clone()
    hidden = torch.zeros(1, 1, 64)
    rotary(hidden, torch.tensor([[511]]))
    assert torch.equal(rotary.inv_freq, plain)
    rotary(hidden, torch.tensor([[1023]]))
    assert not torch.equal(rotary.inv_freq, plain)
