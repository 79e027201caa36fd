"""LLaVA as its authors publish it, against transformers' own model of the same numbers."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.families import Reference, build_reference, read_source, resolve_pruning
from gap_export.spec.manifest import TilesSpec
from gap_export.spec.recipe import Recipe, load_recipe
from gap_export.spec.requests import PruningRequest
from tests.families import reading
from tests.families.llava_layouts import (
    Pieces,
    edit_json,
    take_apart,
    under,
    with_parts,
    write_clip,
    write_json,
    write_original,
    write_state,
)
from tests.families.tiny_llava_next import write_llava_next

ATOL = 1e-5


@pytest.fixture
def recipe(tiny_recipe: Recipe) -> Recipe:
    return with_parts(tiny_recipe)


def build(recipe: Recipe, **parts: Path) -> Reference:
    return reading.build(recipe, parts)


def refusal(recipe: Recipe, **parts: Path) -> str:
    return reading.refusal(recipe, parts)


def assert_all_logits_equal(ref: Reference, theirs: Any, *, atol: float = ATOL) -> None:
    """Our decoder gives the last token's logits alone, so each prefix is run."""
    ids = torch.randint(5, 120, (1, 24), generator=torch.Generator().manual_seed(1))
    ids[0, 2:18] = 3
    pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    spec = ref.decoder_spec
    empty = torch.zeros(1, spec.num_key_value_heads, 0, spec.head_dim)
    with torch.inference_mode():
        wanted = theirs(input_ids=ids, pixel_values=pixels).logits[0]
        embeds = ref.embed_tokens(ids)
        embeds[:, 2:18] = ref.vision_encoder(pixels)[0]
        ours = torch.cat(
            [
                ref.decoder(
                    embeds[:, :length],
                    torch.ones(1, length, dtype=torch.int64),
                    torch.arange(length)[None],
                    *[empty] * (2 * spec.num_layers),
                )[0][0]
                for length in range(1, 25)
            ]
        )
    assert wanted.abs().max() > 0.5
    assert (ours - wanted).abs().max() < atol


@pytest.mark.parametrize(
    ("form", "tower_inside", "clip_form"),
    [
        ("safetensors-sharded", False, "safetensors"),
        ("bin-sharded", True, None),
        ("bin", False, "bin-sharded"),
        ("safetensors", True, "bin"),
    ],
)
def test_all_logits_equal_transformers(
    tmp_path, recipe, theirs, pieces, form, tower_inside, clip_form
):
    parts = {"main": write_original(tmp_path / "m", pieces, form=form, tower_inside=tower_inside)}
    if tower_inside:
        # Another tower beside it says the sizes, and is not taken.
        pieces.tower = {key: tensor + 1 for key, tensor in pieces.tower.items()}
    parts["tower"] = write_clip(tmp_path / "clip", pieces, form=clip_form or "safetensors")
    ref = build(recipe, **parts)
    assert_all_logits_equal(ref, theirs)
    source = read_source(recipe, Checkpoint(parts=parts))
    assert (source.layout, source.dtype, source.eos_token_ids) == (
        "llava-original",
        "float32",
        (2,),
    )
    assert source.image_token_id is None
    assert ("tower" in {role for role, _ in source.files}) != tower_inside
    assert source.tokenizer == parts["main"] / "tokenizer.json"


def test_half_precision_is_kept_and_a_tower_of_another_dtype_follows(tmp_path, recipe, pieces):
    pieces.language = {key: tensor.half() for key, tensor in pieces.language.items()}
    pieces.projector = {key: tensor.half() for key, tensor in pieces.projector.items()}
    main = write_original(tmp_path / "m", pieces, form="bin")
    ref = build(recipe, main=main, tower=write_clip(tmp_path / "clip", pieces))
    assert ref.dtype == "float16"
    assert {p.dtype for c in ref.components for p in c.module.parameters()} == {torch.float16}


@pytest.mark.parametrize("decoder", ["llama", "mistral"])
def test_next_weights_are_those_that_transformers_saved(tmp_path, decoder):
    from transformers import LlavaNextForConditionalGeneration

    write_llava_next(tmp_path / "hf", decoder=decoder)
    recipe = load_recipe(tmp_path / "hf/recipe.yaml")
    saved = read_source(recipe, Checkpoint.of(tmp_path / "hf"))
    pieces = take_apart(LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "hf"))
    main = write_next(tmp_path / "m", pieces, decoder)
    recipe = with_parts(recipe)
    tower = write_clip(tmp_path / "clip", pieces)
    read = read_source(recipe, Checkpoint(parts={"main": main, "tower": tower}))
    assert read.layout == "llava-next-original" and read.architecture == saved.architecture
    # The authors' code goes through the config's sizes, which are (width, height) there.
    sizes = ((32, 64), (64, 32), (64, 64), (96, 32), (32, 96))
    assert read.tiles == TilesSpec(resolutions=sizes, follows="authors") and saved.tiles is None
    assert set(read.weights) == set(saved.weights) and "image_newline" in read.weights
    for key, weight in saved.weights.items():
        assert torch.equal(read.weights[key].load(), weight.load()), key


def write_next(folder: Path, pieces: Pieces, decoder: str = "llama") -> Path:
    pieces.mm_config |= {
        "image_aspect_ratio": "anyres",
        "mm_patch_merge_type": "spatial_unpad",
        # (width, height), and as a string: both occur.
        "image_grid_pinpoints": "[(64, 32), (32, 64), (64, 64), (32, 96), (96, 32)]",
        "unfreeze_mm_vision_tower": True,
    }
    kind = "llava_mistral" if decoder == "mistral" else "llava"
    return write_original(folder, pieces, tower_inside=True, model_type=kind)


@pytest.fixture(scope="module")
def next_parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path, Path]:
    from transformers import LlavaNextForConditionalGeneration

    folder = tmp_path_factory.mktemp("next")
    write_llava_next(folder / "hf")
    pieces = take_apart(LlavaNextForConditionalGeneration.from_pretrained(folder / "hf"))
    recipe = with_parts(load_recipe(folder / "hf/recipe.yaml"))
    return recipe, write_next(folder / "m", pieces), write_clip(folder / "clip", pieces)


def test_trained_tower_that_is_missing_is_not_replaced(tmp_path, next_parts):
    recipe, main, clip = next_parts
    shutil.copytree(main, tmp_path / "m")
    from safetensors.torch import load_file

    state = load_file(tmp_path / "m/model.safetensors")
    state = {key: t for key, t in state.items() if "vision_tower" not in key}
    write_state(tmp_path / "m", state, "safetensors")
    text = refusal(recipe, main=tmp_path / "m", tower=clip)
    assert "its own was trained" in text and "wrong answers" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_grid_pinpoints": [[64, 32], [32, 64]]}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "image_grid_pinpoints"),
        ({"image_grid_pinpoints": ...}, "image_grid_pinpoints"),
        ({"mm_patch_merge_type": "spatial"}, "mm_patch_merge_type"),
        ({"image_aspect_ratio": "pad"}, "image_aspect_ratio"),
    ],
)
def test_next_config_that_is_not_the_recipes_is_refused(tmp_path, next_parts, changes, said):
    recipe, main, clip = next_parts
    shutil.copytree(main, tmp_path / "m", copy_function=os.link)
    (tmp_path / "m/config.json").unlink()
    shutil.copy(main / "config.json", tmp_path / "m/config.json")
    edit_json(tmp_path / "m/config.json", **changes)
    text = refusal(recipe, main=tmp_path / "m", tower=clip)
    assert f"{said} does not fit recipe" in text


def test_layouts_tell_each_other_apart(tmp_path, recipe, pieces, next_parts, tiny_checkpoint):
    main = write_original(tmp_path / "m", pieces)
    next_recipe, next_main, _ = next_parts
    text = refusal(recipe, main=next_main)
    assert "it looks like llava_next (llava-next-original)" in text
    text = refusal(next_recipe, main=main)
    assert "it looks like llava (llava-original)" in text and "llava-hf" not in text
    assert read_source(recipe, Checkpoint.of(tiny_checkpoint)).layout == "llava-hf"


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_one_clip_gives_both_towers(tmp_path, recipe, pieces, tiny_checkpoint, form):
    """As openai/clip-vit-large-patch14-336 does, whose weights are a pickle."""
    from transformers import CLIPTextModelWithProjection

    text = CLIPTextModelWithProjection.from_pretrained(tiny_checkpoint / "clip").eval()
    state = text.state_dict()
    projection = state.pop("text_projection.weight")
    vision_projection = torch.randn(16, 32, generator=torch.Generator().manual_seed(2))
    clip = tmp_path / "clip"
    write_state(
        clip,
        {
            **under("vision_model.", pieces.tower),
            **under("text_model.", {k.removeprefix("text_model."): t for k, t in state.items()}),
            "text_projection.weight": projection,
            "visual_projection.weight": vision_projection,
            "logit_scale": torch.tensor(2.0),
        },
        form,
    )
    sizes = {"vision_config": pieces.vision_config, "text_config": text.config.to_dict()}
    write_json(clip / "config.json", {"model_type": "clip", "projection_dim": 16, **sizes})
    shutil.copy(tiny_checkpoint / "clip/tokenizer.json", clip)
    tower = recipe.text_tower.model_copy(update={"role": "tower", "folder": "."})
    recipe = recipe.model_copy(update={"text_tower": tower})
    pruning = resolve_pruning(recipe, PruningRequest(pruner="text", keep_ratio=0.5, order="raster"))
    parts = {"main": write_original(tmp_path / "m", pieces), "tower": clip}
    ref = build_reference(recipe, Checkpoint(parts=parts), pruning, device="cpu")
    ids = torch.tensor([[1, 10, 14, 16, 2]])
    with torch.inference_mode():
        assert (ref.text_encoder(ids) - text(input_ids=ids).text_embeds).abs().max() < ATOL
    seen = ref.vision_encoder.joint_space.visual_projection.weight
    assert torch.equal(seen, vision_projection)


def test_tied_head_may_be_left_out(tmp_path, recipe, pieces):
    del pieces.language["lm_head.weight"]
    clip = write_clip(tmp_path / "clip", pieces)
    main = write_original(tmp_path / "m", pieces)
    assert "missing lm_head.weight" in refusal(recipe, main=main, tower=clip)
    edit_json(main / "config.json", tie_word_embeddings=True)
    weights = read_source(recipe, Checkpoint(parts={"main": main, "tower": clip})).weights
    assert weights["lm_head.weight"] is weights["decoder.embed_tokens.weight"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mm_projector_type": "linear"}, ["mm_projector_type", "mlp2x_gelu"]),
        ({"mm_vision_select_layer": -1}, ["mm_vision_select_layer", "-1", "-2"]),
        ({"mm_vision_select_feature": "cls_patch"}, ["mm_vision_select_feature", "patch"]),
        ({"mm_use_im_start_end": True}, ["mm_use_im_start_end"]),
        ({"image_aspect_ratio": "square"}, ["image_aspect_ratio", "pad"]),
        ({"mm_hidden_size": 64}, ["mm_hidden_size", "64", "32"]),
        ({"model_type": "llava_mpt"}, ["model_type", "llava_mistral"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["RoPE without scaling"]),
        ({"hidden_size": 48}, ["tensors of the wrong shape", "instead of"]),
        ({"num_hidden_layers": 3}, ["missing decoder.layers.2"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
        ({"eos_token_id": 10**9}, ["eos_token_id"]),
    ],
)
def test_config_that_does_not_fit_is_refused(tmp_path, recipe, pieces, changes, said):
    main = write_original(tmp_path / "m", pieces)
    edit_json(main / "config.json", **changes)
    text = refusal(recipe, main=main, tower=write_clip(tmp_path / "clip", pieces))
    assert all(word in text for word in said), text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model.layers.0.mlp.up_proj.bias": torch.ones(64)}, "unexpected decoder.layers.0.mlp.up"),
        ({"model.mm_projector.4.weight": torch.ones(3)}, "unexpected decoder.mm_projector.4"),
        ({"model.image_newline": torch.ones(32)}, "unexpected image_newline"),
        ({"model.norm.weight": None}, "missing decoder.norm.weight"),
        ({"model.norm.weight": torch.ones(31)}, "decoder.norm.weight [31] instead of [32]"),
        ({"model.norm.weight": torch.ones(32, dtype=torch.int64)}, "I64"),
        ({"model.mm_projector.2.bias": None}, "missing projector.linear_2.bias"),
        (
            {"model.vision_tower.vision_tower.vision_model.post_layernorm.bias": torch.ones(32)},
            "missing tower.",
        ),
    ],
)
def test_tensors_must_match_exactly(tmp_path, recipe, pieces, changes, said):
    for key, tensor in changes.items():
        pieces.extra[key] = tensor
        if tensor is None:
            del pieces.extra[key]
            (pieces.language if key in pieces.language else pieces.projector).pop(key)
        elif key in pieces.language:
            pieces.language.pop(key)
    main = write_original(tmp_path / "m", pieces)
    assert said in refusal(recipe, main=main, tower=write_clip(tmp_path / "clip", pieces))


@pytest.mark.parametrize("alone", [False, True])
def test_missing_projector_is_named(tmp_path, recipe, pieces, alone):
    pieces.projector = {}
    main = write_original(tmp_path / "m", pieces)
    if alone:
        torch.save({}, main / "mm_projector.bin")
    text = refusal(recipe, main=main, tower=write_clip(tmp_path / "clip", pieces))
    assert "holds no projector" in text and "name a whole checkpoint" in text
    assert ("mm_projector.bin, which is not read" in text) == alone


def test_missing_tower_says_how_to_pass_it(tmp_path, recipe, pieces):
    main = write_original(tmp_path / "m", pieces)
    text = refusal(recipe, main=main)
    assert "needs the tiny CLIP" in text and "--checkpoint tower=" in text and "tiny/clip" in text


def test_inner_tower_of_unknown_size_says_how_to_tell(tmp_path, recipe, pieces):
    main = write_original(tmp_path / "m", pieces, tower_inside=True)
    text = refusal(recipe, main=main)
    assert "does not say the sizes of the vision tower" in text
    assert "--checkpoint tower=PATH" in text


def test_tower_that_does_not_fit_is_refused(tmp_path, recipe, pieces):
    main = write_original(tmp_path / "m", pieces)
    clip = write_clip(tmp_path / "clip", pieces)
    write_state(
        clip,
        {**under("vision_model.", pieces.tower), "vision_model.extra": torch.ones(1)},
        "safetensors",
    )
    assert "unexpected tower.extra" in refusal(recipe, main=main, tower=clip)
    write_state(clip, {**under("vision_model.", pieces.tower), "odd": torch.ones(1)}, "safetensors")
    assert "unexpected odd" in refusal(recipe, main=main, tower=clip)

    pieces.vision_config["image_size"] = 40
    pieces.tower["embeddings.position_embedding.weight"] = torch.ones(26, 32)
    other = write_clip(tmp_path / "other", pieces)
    assert "image size, visual token grid" in refusal(recipe, main=main, tower=other)
    assert "model_type 'llava'" in refusal(recipe, main=main, tower=main)


def test_folder_without_weights_or_tokenizer_is_refused(tmp_path, recipe, pieces):
    main = write_original(tmp_path / "m", pieces)
    clip = write_clip(tmp_path / "clip", pieces)
    (main / "tokenizer.json").unlink()
    assert "tokenizer.json or tokenizer.model" in refusal(recipe, main=main, tower=clip)
    (main / "model.safetensors").unlink()
    assert "no weights in the checkpoint folder" in refusal(recipe, main=main, tower=clip)
