"""Shikra in its own layouts, against transformers' Llama and CLIP put together by hand."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.checkpoint.weights import DerivedWeight
from gap_export.errors import RecipeError
from gap_export.families import (
    Reference,
    build_reference,
    find_family,
    load_builder,
    read_source,
    resolve_pruning,
    supported_pruners,
)
from gap_export.runtime.prompt import PromptEncoder
from gap_export.spec.positions import VisualSpan, build_kept_positions
from gap_export.spec.recipe import Recipe
from gap_export.spec.requests import PruningRequest
from tests.families import reading
from tests.families.masked_oracle import (
    check_masked_oracle,
    logits_of_every_token,
    spliced,
    torch_decoder,
)
from tests.families.reading import refusal
from tests.families.tiny_shikra import (
    BASE_VOCAB,
    LLAMA,
    TinyShikra,
    add_by_hand,
    clip_config,
    llama_of,
    make_shikra,
    shikra_recipe,
    write_clip,
    write_llama,
    write_parts,
    write_shikra,
)

build = functools.partial(reading.build, dtype="float32")

ATOL = 1e-4
NUM_VISUAL = 16
UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def made() -> TinyShikra:
    return make_shikra()


@pytest.fixture
def tiny(made: TinyShikra) -> TinyShikra:
    """One whose dicts a test may change."""
    return TinyShikra(
        base=dict(made.base),
        vicuna=dict(made.vicuna),
        delta=dict(made.delta),
        trained=dict(made.trained),
        clip=made.clip,
        config=dict(made.config),
    )


@pytest.fixture(scope="module")
def shared_parts(made: TinyShikra, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Read only."""
    return write_parts(tmp_path_factory.mktemp("shikra"), made)


@pytest.fixture
def parts(tiny: TinyShikra, tmp_path: Path) -> dict[str, Path]:
    return write_parts(tmp_path, tiny)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return shikra_recipe()


def images(count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def features_by_hand(tiny: TinyShikra) -> torch.Tensor:
    """CLIP's last hidden state but one without CLS, through one linear layer: [N, H]."""
    seen = tiny.clip.vision_model(images(), output_hidden_states=True)
    weight, bias = (tiny.delta[f"model.mm_projector.{k}"].float() for k in ("weight", "bias"))
    return seen.hidden_states[-2][0, 1:] @ weight.T + bias


def prompt_by_hand(model: Any, visual: torch.Tensor) -> torch.Tensor:
    """Words, <im_start>, the image in mid-sentence, <im_end>, words: [1, L, H]."""
    before, after = [1, 20, 14, 33, BASE_VOCAB + 1], [BASE_VOCAB + 2, 40, 9, 12, 25]
    table = model.get_input_embeddings().weight
    return torch.cat((table[before], visual, table[after]))[None]


def assert_all_logits_equal(tiny: TinyShikra, reference: Reference) -> None:
    model = llama_of(tiny.trained)
    with torch.inference_mode():
        full = prompt_by_hand(model, features_by_hand(tiny))
        wanted = model(inputs_embeds=full).logits[0]
        ours = prompt_by_hand(model, reference.vision_encoder(images())[0][0])
        assert (ours - full).abs().max() < 1e-5
        ids = torch.tensor([[1, 20, BASE_VOCAB + 2]])
        table = model.get_input_embeddings().weight
        assert torch.equal(reference.embed_tokens(ids), table[ids])
    assert wanted.abs().max() > 0.5
    assert np.abs(logits_of_every_token(reference, ours.numpy()) - wanted.numpy()).max() < ATOL


def test_delta_plus_base_gives_the_logits_of_the_model_added_by_hand(made, recipe, shared_parts):
    source = read_source(recipe, Checkpoint(parts=shared_parts))
    assert (source.layout, source.dtype) == ("shikra-delta", "float16")
    assert source.eos_token_ids == (2,) and source.image_token_id is None
    assert {role for role, _ in source.files} == {"main", "base", "tower"}
    assert_all_logits_equal(made, build(recipe, shared_parts))


def test_every_merged_weight_is_the_sum_to_the_bit(made, recipe, shared_parts):
    weights = read_source(recipe, Checkpoint(parts=shared_parts)).weights
    for key, wanted in made.trained.items():
        ours = key.replace("model.mm_projector.", "projector.linear_1.")
        ours = ours.replace("model.", "decoder.", 1) if ours.startswith("model.") else ours
        assert torch.equal(weights[ours].load(), wanted), key
    expected = load_builder(find_family(recipe)).expected_tensors(
        read_source(recipe, Checkpoint(parts=shared_parts)).architecture
    )
    assert {key: weight.shape for key, weight in weights.items()} == expected


@pytest.mark.parametrize("form", ["bin", "safetensors", "safetensors-sharded"])
def test_every_form_of_the_delta_is_read(tiny, recipe, parts, tmp_path, form):
    parts["main"] = write_shikra(tmp_path / "other", tiny, form=form, with_tokenizer=True)
    parts["base"] = write_llama(tmp_path / "llama", tiny.base, form="bin-sharded")
    source = read_source(recipe, Checkpoint(parts=parts))
    assert torch.equal(
        source.weights["decoder.norm.weight"].load(), tiny.trained["model.norm.weight"]
    )


def test_tokenizer_is_the_main_parts_where_it_has_one(tiny, recipe, parts, tmp_path):
    from tokenizers import Tokenizer

    def ids(source) -> list[int | None]:
        text = source.tokenizer
        text = text.read_text() if isinstance(text, Path) else text.decode()
        tokenizer = Tokenizer.from_str(text)
        return [tokenizer.token_to_id(t) for t in ("<im_patch>", "<im_start>", "<im_end>")]

    added = [BASE_VOCAB, BASE_VOCAB + 1, BASE_VOCAB + 2]
    assert ids(read_source(recipe, Checkpoint(parts=parts))) == added
    (parts["base"] / "tokenizer.json").unlink()
    assert "tokenizer was not found" in refusal(recipe, parts)
    parts["main"] = write_shikra(tmp_path / "other", tiny, with_tokenizer=True)
    assert ids(read_source(recipe, Checkpoint(parts=parts))) == added


def test_merged_checkpoint_needs_no_base_and_gets_none(tiny, recipe, parts, tmp_path, caplog):
    parts["main"] = write_shikra(tmp_path / "whole", tiny, state=tiny.trained, with_tokenizer=True)
    without = {role: path for role, path in parts.items() if role != "base"}
    assert_all_logits_equal(tiny, build(recipe, without))
    with caplog.at_level("INFO", logger="gap_export"):
        source = read_source(recipe, Checkpoint(parts=parts))
    assert source.layout == "shikra-merged" and "is not used" in caplog.text
    assert not any(isinstance(weight, DerivedWeight) for weight in source.weights.values())
    assert {role for role, _ in source.files} == {"main", "tower"}


def test_meta_reference_loads_no_weight_but_a_sample(recipe, shared_parts, monkeypatch):
    def forbidden(*_: object) -> None:
        raise AssertionError("a merged weight was computed")

    monkeypatch.setattr(DerivedWeight, "load", forbidden)
    reference = build(recipe, shared_parts, device="meta", dtype=None)
    assert reference.dtype == "float16"
    for component in reference.components:
        assert all(parameter.is_meta for parameter in component.module.parameters())


@pytest.mark.parametrize("pruner", ["cls", "fastervlm", "spatial", "random", "text"])
def test_masked_oracle_holds_in_mid_sentence(recipe, shared_parts, pruner):
    assert pruner in supported_pruners(recipe)
    every = build(recipe, shared_parts)
    pruned = build(recipe, shared_parts, pruner, 0.3)
    with torch.inference_mode():
        visual, _, *_ = every.vision_encoder(images())
        feeds = [images()]
        if pruned.text_encoder is not None:
            feeds.append(pruned.text_encoder(torch.tensor([[1, 12, 15, 2]])))
        features, keep, *_ = pruned.vision_encoder(*feeds)
    assert (features[0] - visual[0, keep[0]]).abs().max() < 1e-5
    full = spliced(every, visual[0].numpy(), before=6, after=7)
    span = VisualSpan(start=6, num_visual_tokens=NUM_VISUAL, keep_indices=keep[0].numpy())
    table = build_kept_positions(unpruned_length=full.shape[1], spans=[span])
    check_masked_oracle(every, torch_decoder(every), full, table, steps=5)


def test_random_weights_need_no_checkpoint(recipe, shared_parts):
    architecture = read_source(recipe, Checkpoint(parts=shared_parts)).architecture
    sized = recipe.model_copy(update={"architecture": architecture})
    pruning = resolve_pruning(sized, PruningRequest(pruner="cls", keep_ratio=0.5, order="raster"))
    drawn = Checkpoint(parts={}, random_seed=4)
    reference = build_reference(sized, drawn, pruning, device="cpu", dtype="float32")
    with torch.inference_mode():
        features, keep, *_ = reference.vision_encoder(images(2))
    assert features.shape == (2, 8, 32) and keep.shape == (2, 8)
    assert torch.isfinite(features).all() and features.std() > 0


# --- the base -------------------------------------------------------------------------------------


def test_vicuna_that_says_so_is_refused_as_base(tiny, recipe, parts, tmp_path):
    parts["base"] = write_llama(tmp_path / "a", tiny.vicuna, _name_or_path="lmsys/vicuna-7b-v1.3")
    message = refusal(recipe, parts)
    assert "trained further" in message and "vicuna-7b-v1.3" in message
    assert "original LLaMA-7B" in message
    parts["base"] = write_llama(tmp_path / "vicuna-7b-v1.1", tiny.vicuna)
    assert "trained further" in refusal(recipe, parts)
    cached = tmp_path / "models--lmsys--vicuna-7b-v1.3/snapshots/0123"
    parts["base"] = write_llama(cached, tiny.vicuna)
    assert "models--lmsys--vicuna-7b-v1.3" in refusal(recipe, parts)


def test_vicuna_in_disguise_is_found_out_by_its_numbers(tiny, recipe, parts, tmp_path):
    parts["base"] = write_llama(tmp_path / "llama", tiny.vicuna)
    message = refusal(recipe, parts)
    assert "is not the model that the delta of tiny-shikra was made from" in message
    assert "are no float16 numbers" in message


def test_float32_copy_of_the_right_base_is_fine_and_a_bfloat16_copy_is_not(
    tiny, recipe, parts, tmp_path
):
    wide = {key: tensor.float() for key, tensor in tiny.base.items()}
    parts["base"] = write_llama(tmp_path / "f32", wide)
    weight = read_source(recipe, Checkpoint(parts=parts)).weights["lm_head.weight"]
    assert torch.equal(weight.load(), tiny.trained["lm_head.weight"])
    cut = {key: tensor.bfloat16() for key, tensor in tiny.base.items()}
    parts["base"] = write_llama(tmp_path / "bf16", cut)
    assert "(BF16)" in refusal(recipe, parts)


def test_delta_finer_than_float16_says_nothing_about_its_base(
    tiny, recipe, parts, tmp_path, caplog
):
    fine = {k: t.float() * (1 + 1e-5) for k, t in tiny.delta.items()}
    parts["main"] = write_shikra(tmp_path / "fine", tiny, state=fine)
    parts["base"] = write_llama(tmp_path / "llama", tiny.vicuna)
    assert read_source(recipe, Checkpoint(parts=parts)).dtype == "float32"
    assert "cannot be told" in caplog.text


def test_bfloat16_delta_says_nothing_about_its_base(tiny, recipe, parts, tmp_path):
    cut = {k: t.bfloat16() for k, t in tiny.delta.items()}
    parts["main"] = write_shikra(tmp_path / "cut", tiny, state=cut)
    assert read_source(recipe, Checkpoint(parts=parts)).dtype == "bfloat16"


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        # Llama 2 is of LLaMA's width, and is not it.
        ({"rms_norm_eps": 1e-5, "max_position_embeddings": 512}, "rms_norm_eps 1e-05"),
        ({"rope_theta": 5e5}, "rope_theta 500000.0"),
    ],
)
def test_llama_2_is_refused_as_base(tiny, recipe, parts, tmp_path, change, seen):
    parts["base"] = write_llama(tmp_path / "llama", tiny.base, **change)
    message = refusal(recipe, parts)
    assert "is not the base model of tiny-shikra" in message and seen in message


def test_base_of_another_width_depth_or_vocabulary_is_refused(tiny, recipe, parts, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 40, "num_hidden_layers": 3, "vocab_size": BASE_VOCAB + 1}
    for key, value in sizes.items():
        config = {**LLAMA, "vocab_size": BASE_VOCAB, key: value}
        state = LlamaForCausalLM(LlamaConfig(**config)).half().state_dict()
        parts["base"] = write_llama(tmp_path / key, state, **{key: value})
        message = refusal(recipe, parts)
        name = "num_layers" if "layers" in key else key
        assert f"{name} {value}" in message and "original LLaMA-7B" in message


def test_delta_as_its_own_base_is_refused(tiny, recipe, parts, tmp_path):
    cut = {
        key: tensor[:BASE_VOCAB] if len(tensor) == BASE_VOCAB + 3 else tensor
        for key, tensor in tiny.delta.items()
        if "mm_projector" not in key
    }
    parts["base"] = write_llama(tmp_path / "llama", cut)
    assert "is itself a delta" in refusal(recipe, parts)


def test_delta_without_base_says_what_is_needed(recipe, parts):
    del parts["base"]
    message = refusal(recipe, parts)
    assert "original LLaMA-7B" in message and "base" in message


def test_base_with_a_tensor_too_many_or_too_few_is_refused(tiny, recipe, parts, tmp_path):
    more = {**tiny.base, "model.layers.0.extra.weight": torch.ones(2).half()}
    parts["base"] = write_llama(tmp_path / "more", more)
    assert "unexpected decoder.layers.0.extra.weight" in refusal(recipe, parts)
    parts["base"] = write_llama(
        tmp_path / "fewer", {k: t for k, t in tiny.base.items() if k != UP_PROJ}
    )
    assert "missing decoder.layers.1.mlp.up_proj.weight" in refusal(recipe, parts)


# --- the delta and the tower ----------------------------------------------------------------------


def test_delta_with_a_tensor_too_many_or_too_few_is_refused(tiny, recipe, parts, tmp_path):
    more = {**tiny.delta, "model.vision_tower.weight": torch.ones(2).half()}
    parts["main"] = write_shikra(tmp_path / "more", tiny, state=more)
    assert "unexpected decoder.vision_tower.weight" in refusal(recipe, parts)
    fewer = {k: t for k, t in tiny.delta.items() if "mm_projector" not in k}
    parts["main"] = write_shikra(tmp_path / "fewer", tiny, state=fewer)
    assert "missing projector.linear_1.bias" in refusal(recipe, parts)


def test_tower_of_another_size_is_refused(recipe, parts, tmp_path):
    from transformers import CLIPModel

    clip = CLIPModel(clip_config(image_size=48))
    parts["tower"] = write_clip(tmp_path / "clip-336", clip)
    message = refusal(recipe, parts)
    assert "clip-336" in message and "image size" in message and "[48, 48]" in message


def test_other_select_layer_is_refused(tiny, recipe, parts, tmp_path):
    tiny.config["mm_vision_select_layer"] = -1
    parts["main"] = write_shikra(tmp_path / "other", tiny)
    assert "mm_vision_select_layer" in refusal(recipe, parts)


def test_llama_or_llava_is_no_shikra(recipe, parts, tiny_checkpoint):
    message = refusal(recipe, {**parts, "main": parts["base"]})
    assert "is not a checkpoint of family shikra" in message and "'llama'" in message
    assert "llava-hf" in refusal(recipe, {**parts, "main": tiny_checkpoint})


def test_recipe_must_say_what_ends_an_answer(recipe, parts):
    silent = recipe.model_copy(update={"end_of_answer": ()})
    with pytest.raises(RecipeError, match="does not say what ends an answer"):
        read_source(silent, Checkpoint(parts=parts))


def test_config_that_is_no_json_is_refused(recipe, parts):
    plain = json.loads((parts["main"] / "config.json").read_text())
    plain["num_attention_heads"] = 5
    (parts["main"] / "config.json").write_text(json.dumps(plain))
    assert "num_attention_heads" in refusal(recipe, parts)
    (parts["main"] / "config.json").write_text("{")
    assert "is damaged or not what it should be" in refusal(recipe, parts)


def test_adding_by_hand_is_what_shikra_does(tiny):
    """The maker itself: half a precision, and the base's rows alone."""
    assert torch.equal(add_by_hand(tiny.delta, tiny.base)["lm_head.weight"][-3:],
                       tiny.delta["lm_head.weight"][-3:])  # fmt: skip
    assert tiny.trained["lm_head.weight"].dtype == torch.float16


# --- the prompt -----------------------------------------------------------------------------------


def test_image_stands_in_mid_sentence_between_its_two_tokens(
    recipe, shared_parts, sample_manifest, tmp_path
):
    source = read_source(recipe, Checkpoint(parts=shared_parts))
    (tmp_path / "tokenizer.json").write_bytes(source.tokenizer)
    decoder = dataclasses.replace(sample_manifest.decoder, max_position_embeddings=2048)
    manifest = dataclasses.replace(sample_manifest, prompt=recipe.prompt, decoder=decoder)
    encoder = PromptEncoder(manifest, tmp_path)
    short, long = encoder.encode("the cup"), encoder.encode("the small red cup")
    for encoded in (short, long):
        assert encoded.prefix_ids[0] == 1 and 1 not in encoded.prefix_ids[1:]
        assert encoded.prefix_ids[-1] == BASE_VOCAB + 1
        assert encoded.suffix_ids[0] == BASE_VOCAB + 2 and len(encoded.suffix_ids) > 5
    # The expression stands before the image, so the image starts elsewhere for each.
    assert len(long.prefix_ids) == len(short.prefix_ids) + 2
    assert list(long.suffix_ids) == list(short.suffix_ids)
