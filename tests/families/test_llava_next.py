"""LLaVA-1.6 against transformers' own, packing of tiles included, on random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import CheckpointError, RecipeError
from gap_export.families import Reference, build_reference, resolve_pruning
from gap_export.runtime.images.image import prepare_image
from gap_export.runtime.images.preparations import tile_layout
from gap_export.spec.positions import VisualSpan, build_kept_positions
from gap_export.spec.recipe import Recipe, load_recipe
from gap_export.spec.requests import PruningRequest
from gap_export.spec.tiles import TiledTokens, arrange_tiles
from tests.families import rewriting
from tests.families.masked_oracle import (
    check_masked_oracle,
    logits_of_every_token,
    random_ids,
    spliced,
    torch_decoder,
)
from tests.families.tiny_llava_next import IMAGE_TOKEN, write_llava_next

ATOL = 1e-4
BEFORE, AFTER = 5, 4
# (width, height); tall, wide, square, thin, small, and sizes that round either way.
SIZES = [(40, 120), (150, 60), (64, 64), (9, 200), (201, 13), (10, 12), (57, 64), (61, 37)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """One checkpoint, ours and transformers'."""

    folder: Path
    recipe: Recipe
    theirs: Any

    @cache  # noqa: B019 - a model lives as long as its module's tests
    def reference(self, pruner: str = "spatial", keep_ratio: float = 1.0) -> Reference:
        pruning = resolve_pruning(
            self.recipe, PruningRequest(pruner=pruner, keep_ratio=keep_ratio, order="raster")
        )
        return build_reference(self.recipe, Checkpoint.of(self.folder), pruning, device="cpu")


@pytest.fixture(scope="module", params=["llama", "mistral"])
def model(request, tmp_path_factory) -> Model:
    from transformers import LlavaNextForConditionalGeneration

    folder = tmp_path_factory.mktemp("next") / request.param
    write_llava_next(folder, decoder=request.param)
    theirs = LlavaNextForConditionalGeneration.from_pretrained(folder, attn_implementation="eager")
    return Model(folder=folder, recipe=load_recipe(folder / "recipe.yaml"), theirs=theirs.eval())


def noise(size: tuple[int, int]) -> Image.Image:
    pixels = np.random.default_rng(size[0]).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def tiled(model: Model, reference: Reference, image: Image.Image) -> tuple[np.ndarray, TiledTokens]:
    """The visual vectors [M, H] as they are fed, and what they are."""
    pixel_values, geometry = prepare_image(image, model.recipe.image)
    layout = tile_layout(geometry, model.recipe.image, model.recipe.grid)
    assert layout is not None and pixel_values.shape[0] == layout.num_tiles
    with torch.inference_mode():
        features, keep, *_ = reference.vision_encoder(torch.from_numpy(pixel_values))
    tokens = arrange_tiles(keep.numpy(), layout)
    # The last row stands for the newline, so that its source -1 finds it.
    rows = np.concatenate([features.flatten(0, 1).numpy(), reference.newline.numpy()[None]])
    return rows[tokens.source], tokens


@pytest.mark.parametrize("size", SIZES)
def test_unpruned_logits_of_every_token_equal_transformers(model, size):
    reference, image = model.reference(), noise(size)
    visual, tokens = tiled(model, reference, image)
    full = spliced(reference, visual, before=BEFORE, after=AFTER)

    words = random_ids(BEFORE + AFTER)
    count = tokens.num_visual_tokens
    ids = np.concatenate([words[:BEFORE], np.full(count, IMAGE_TOKEN), words[BEFORE:]])
    pixel_values, _ = prepare_image(image, model.recipe.image)
    with torch.inference_mode():
        # It refuses another number of image tokens than its own packing gives.
        wanted = model.theirs(
            input_ids=torch.from_numpy(ids)[None],
            pixel_values=torch.from_numpy(pixel_values)[None],
            image_sizes=torch.tensor([[size[1], size[0]]]),
        ).logits.numpy()[0]
    assert np.abs(wanted).max() > 0.5
    assert np.abs(logits_of_every_token(reference, full) - wanted).max() <= ATOL


@pytest.mark.parametrize("pruner", ["cls", "random", "spatial", "fastervlm"])
@pytest.mark.parametrize("size", [(40, 120), (150, 60), (64, 64)])
def test_pruned_tiles_equal_the_unpruned_sequence_at_keep_indices(model, pruner, size):
    unpruned, every = tiled(model, model.reference(), noise(size))
    pruned, tokens = tiled(model, model.reference(pruner, 0.3), noise(size))
    assert tokens.num_visual_tokens == every.num_visual_tokens == len(unpruned)
    assert np.abs(pruned - unpruned[tokens.keep_indices]).max() < 2e-5
    # All newlines survive, where they were.
    newlines = tokens.keep_indices[tokens.source == -1]
    assert np.array_equal(newlines, every.keep_indices[every.source == -1])


@pytest.mark.parametrize("pruner", ["cls", "random", "spatial", "fastervlm"])
@pytest.mark.parametrize("size", [(40, 120), (150, 60), (64, 64)])
def test_oracle_holds_with_tiles_and_newlines(model, pruner, size):
    visual, every = tiled(model, model.reference(), noise(size))
    _, tokens = tiled(model, model.reference(pruner, 0.3), noise(size))
    full = spliced(model.reference(), visual, before=BEFORE, after=AFTER)
    span = VisualSpan(
        start=BEFORE,
        num_visual_tokens=every.num_visual_tokens,
        keep_indices=tokens.keep_indices,
    )
    table = build_kept_positions(unpruned_length=full.shape[1], spans=[span])
    check_masked_oracle(model.reference(), torch_decoder(model.reference()), full, table, steps=10)


@pytest.mark.parametrize("pruner", ["cls", "fastervlm"])
def test_each_tile_is_pruned_by_its_own_cls(model, pruner):
    pixel_values = torch.from_numpy(prepare_image(noise((64, 64)), model.recipe.image)[0])
    encoder = model.reference(pruner, 0.3).vision_encoder
    with torch.inference_mode():
        _, together, *_ = encoder(pixel_values)
        alone = [encoder(tile[None])[1] for tile in pixel_values]
    assert torch.equal(together, torch.cat(alone))
    assert len({tuple(row) for row in together.tolist()}) > 1


def test_newline_is_the_checkpoints_vector(model):
    assert torch.equal(model.reference().newline, model.theirs.model.image_newline)


def test_decoder_keeps_its_own_rope_and_heads(model):
    text = model.theirs.config.text_config
    decoder, spec = model.reference().decoder, model.reference().decoder_spec
    assert spec.num_key_value_heads == text.num_key_value_heads
    theta = text.rope_parameters["rope_theta"]
    wanted = theta ** -(torch.arange(0, spec.head_dim, 2) / spec.head_dim)
    assert torch.allclose(decoder.inv_freq, wanted)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_grid_pinpoints": [[32, 64], [64, 32]]}, r"image_grid_pinpoints.*96"),
        ({"image_grid_pinpoints": ["x"]}, r"image_grid_pinpoints"),
        ({"image_grid_pinpoints": 7}, r"does not parse"),
        ({"use_image_newline_parameter": False}, r"use_image_newline_parameter.*allowed: True"),
        ({"vision_feature_layer": [-2, -5]}, r"vision_feature_layer"),
    ],
)
def test_config_of_another_tiling_is_refused(model, tmp_path, change, says):
    folder = Path(shutil.copytree(model.folder, tmp_path / "c"))
    plain = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(plain | change))
    with pytest.raises(CheckpointError, match=says):
        Model(folder=folder, recipe=model.recipe, theirs=None).reference()


def test_window_that_hides_tokens_is_refused(model, tmp_path):
    folder = Path(shutil.copytree(model.folder, tmp_path / "c"))
    plain = json.loads((folder / "config.json").read_text())
    plain["text_config"] |= {"model_type": "mistral", "sliding_window": 16}
    (folder / "config.json").write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match=r"sliding_window.*16.*null"):
        Model(folder=folder, recipe=model.recipe, theirs=None).reference()


def test_recipe_without_tiles_is_refused(model):
    squashed = replace(model.recipe.image, preparation="squash", tiles=None)
    recipe = model.recipe.model_copy(update={"image": squashed})
    with pytest.raises(RecipeError, match=r"llava_next.*squash.*allowed: anyres"):
        Model(folder=model.folder, recipe=recipe, theirs=None).reference()


@pytest.mark.parametrize("to", ["llava", "llava_next"])
def test_checkpoint_of_the_other_llava_is_told_apart(model, tiny_checkpoint, tiny_recipe, to):
    recipe, folder = (
        (tiny_recipe, model.folder) if to == "llava" else (model.recipe, tiny_checkpoint)
    )
    other = {"llava": r"llava_next \(llava-next-hf\)", "llava_next": r"llava \(llava-hf\)"}[to]
    with pytest.raises(CheckpointError, match=rf"not a checkpoint of family {to}: .*{other}"):
        Model(folder=folder, recipe=recipe, theirs=None).reference()


def test_newline_may_not_be_left_out(model, tmp_path):
    def drop(tensors: rewriting.Tensors) -> rewriting.Tensors:
        return {key: tensor for key, tensor in tensors.items() if key != "image_newline"}

    folder = rewriting.rewrite(model.folder, tmp_path / "c", drop)
    with pytest.raises(CheckpointError, match="missing image_newline"):
        Model(folder=folder, recipe=model.recipe, theirs=None).reference()


def test_newline_of_another_width_is_refused(model, tmp_path):
    def widen(tensors: rewriting.Tensors) -> rewriting.Tensors:
        return tensors | {"image_newline": torch.zeros(33)}

    folder = rewriting.rewrite(model.folder, tmp_path / "c", widen)
    with pytest.raises(CheckpointError, match=r"image_newline \[33\] instead of \[32\]"):
        Model(folder=folder, recipe=model.recipe, theirs=None).reference()
