"""Prompts, images, position ids and logits against transformers' own classes, same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.exporting.torch_backend import TorchBackend
from gap_export.families import Reference, build_reference, resolve_pruning
from gap_export.runtime.generation import PromptRow, assemble_prompt, embed_tokens, generate
from gap_export.runtime.images.image import prepare_image
from gap_export.spec.positions import VisualSpan, unpruned_ids
from gap_export.spec.recipe import Recipe, find_recipe, load_recipe
from gap_export.spec.requests import PruningRequest
from tests.families.qwen_vl.tiny import (
    CANVASES,
    FAMILIES,
    IMAGE,
    MERGE,
    PATCH,
    TOKEN,
    VIDEO,
    Tiny,
    patches_of,
    plain_recipe,
    stand_in_prompt,
)

ATOL = 1e-4
STEPS = 20
CLASSES = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
SHIPPED = {"qwen2_vl": "qwen2-vl-2b", "qwen2_5_vl": "qwen2.5-vl-3b", "qwen3_vl": "qwen3-vl-2b"}
# (width, height) of images whose resized form is one of the canvases.
SHAPES = [
    (640, 480),
    (480, 640),
    (641, 478),
    (64, 64),
    (1280, 704),
    (333, 500),
    (100, 900),
    (57, 41),
]


def image_processor(family: str, patch: int) -> Any:
    """As published, but without limits of the area, in pixels."""
    image = find_recipe(SHIPPED[family])[0].image
    return Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=MERGE,
        size={"shortest_edge": 1, "longest_edge": 1 << 24},
        image_mean=list(image.mean),
        image_std=list(image.std),
    )


@pytest.mark.parametrize("size", SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_image_is_prepared_as_by_the_authors_processor(family, size):
    recipe, _ = find_recipe(SHIPPED[family])
    assert recipe.architecture is not None
    patch = recipe.architecture.vision.patch_size
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 3, size[0] // 3, 3), np.uint8)
    image = Image.fromarray(noise).resize(size, Image.Resampling.BILINEAR)
    theirs = image_processor(family, patch)(images=[image], return_tensors="pt")
    _, rows, cols = theirs["image_grid_thw"][0].tolist()
    spec = replace(recipe.image, height=rows * patch, width=cols * patch)
    pixels, _ = prepare_image(image, spec)
    ours = patches_of(torch.from_numpy(pixels[0]), patch)
    assert ours.shape == theirs["pixel_values"].shape
    # Both compute in float32, in another order.
    assert (ours - theirs["pixel_values"]).abs().max() < 2e-6


def test_prompt_ids_are_those_of_the_authors_processor(tiny):
    prefix, suffix = stand_in_prompt(tiny.folder, "the red cup, by the 2nd door")
    template = load_recipe(tiny.folder / "recipe.yaml").prompt.template
    text = template.replace("{expression}", "the red cup, by the 2nd door")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tiny.folder / "tokenizer.json"), pad_token="<|endoftext|>"
    )
    kind = getattr(transformers, f"{CLASSES[tiny.family]}Processor")
    # Its own constructor asks for a processor of videos, which needs torchvision.
    processor = kind.__new__(kind)
    processor.tokenizer, processor.image_processor = tokenizer, image_processor(tiny.family, PATCH)
    processor.video_processor = processor.chat_template = None
    processor.image_token, processor.video_token = "<|image_pad|>", "<|video_pad|>"
    processor.image_token_id, processor.video_token_id = IMAGE, VIDEO
    height, width = CANVASES["rows < cols"]
    image = Image.new("RGB", (width, height))
    found = processor(images=[image], text=[text], return_tensors="pt")["input_ids"][0].tolist()
    number = (height // TOKEN) * (width // TOKEN)
    assert found == [*prefix, *[IMAGE] * number, *suffix]


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (3, 4), (17, 23), (20, 15)], ids=str)
@pytest.mark.parametrize(("before", "after"), [(0, 1), (3, 4), (15, 20)])
def test_unpruned_ids_are_those_of_get_rope_index(tiny, grid, before, after):
    rows, cols = grid
    number = rows * cols
    tokens = [7] * before + [IMAGE] * number + [9] * after
    types = [0] * before + [1] * number + [0] * after
    theirs, delta = tiny.model.model.get_rope_index(
        torch.tensor([tokens]),
        mm_token_type_ids=torch.tensor([types]),
        image_grid_thw=torch.tensor([[1, rows * MERGE, cols * MERGE]]),
    )
    span = VisualSpan(
        start=before, num_visual_tokens=number, keep_indices=np.arange(number), grid=grid
    )
    ours = unpruned_ids(len(tokens), [span], position_axes=3)
    assert np.array_equal(ours, theirs[:, 0].numpy())
    assert ours.max() + 1 - len(tokens) == delta.item()


@pytest.mark.parametrize("canvas", ["rows < cols", "rows > cols"])
def test_logits_of_prefill_and_of_twenty_steps_equal_those_of_transformers(tiny, canvas):
    height, width = CANVASES[canvas]
    recipe = Recipe.model_validate(plain_recipe(tiny.family, (height, width)))
    pruning = resolve_pruning(recipe, PruningRequest(keep_ratio=1.0))
    reference = build_reference(recipe, Checkpoint.of(tiny.folder), pruning, device="cpu")
    pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))
    prefix, suffix = stand_in_prompt(tiny.folder, "the star")
    steps = np.random.default_rng(0).integers(5, 250, size=(1, STEPS))
    theirs = _logits_of_transformers(tiny, pixels, prefix, suffix, steps[0])
    backend = TorchBackend(reference)
    ours = _ours(backend, reference, pixels, prefix, suffix, forced_tokens=steps).logits
    assert ours is not None and theirs.std() > 0.5
    assert np.abs(ours[0] - theirs).max() < ATOL


def _logits_of_transformers(
    tiny: Tiny, pixels: torch.Tensor, prefix: list[int], suffix: list[int], steps: np.ndarray
) -> np.ndarray:
    """[steps, V], through its own cache, and its own ids."""
    found = []
    inputs = _inputs(pixels, prefix, suffix)
    tiny.model.model.rope_deltas = None
    with torch.inference_mode():
        past = transformers.DynamicCache()
        out = tiny.model(**inputs, past_key_values=past, use_cache=True)
        found.append(out.logits[0, -1])
        delta, length = tiny.model.model.rope_deltas.item(), inputs["input_ids"].shape[1]
        for number, token in enumerate(steps[:-1].tolist()):
            place = torch.full((3, 1, 1), length + number + delta)
            out = tiny.model(
                input_ids=torch.tensor([[token]]), position_ids=place, past_key_values=past
            )
            found.append(out.logits[0, -1])
    return torch.stack(found).numpy()


def _inputs(pixels: torch.Tensor, prefix: list[int], suffix: list[int]) -> dict[str, torch.Tensor]:
    """What transformers' models take of one image and its prompt."""
    _, _, height, width = pixels.shape
    number = (height // TOKEN) * (width // TOKEN)
    tokens = [*prefix, *[IMAGE] * number, *suffix]
    types = [0] * len(prefix) + [1] * number + [0] * len(suffix)
    return {
        "input_ids": torch.tensor([tokens]),
        "mm_token_type_ids": torch.tensor([types]),
        "attention_mask": torch.ones(1, len(tokens), dtype=torch.int64),
        "pixel_values": patches_of(pixels[0]),
        "image_grid_thw": torch.tensor([[1, height // PATCH, width // PATCH]]),
    }


def _ours(
    backend: Any,
    reference: Reference,
    pixels: torch.Tensor,
    prefix: list[int],
    suffix: list[int],
    **options: Any,
) -> Any:
    """A generation, by the loop that sessions use."""
    with torch.inference_mode():
        features, keep = reference.vision_encoder(pixels)
    _, _, height, width = pixels.shape
    grid = height // TOKEN, width // TOKEN
    words = embed_tokens(backend, np.array([[*prefix, *suffix]]))[0]
    row = PromptRow(
        prefix_embeds=words[: len(prefix)],
        suffix_embeds=words[len(prefix) :],
        image_features=features[0].numpy(),
        keep_indices=keep[0].numpy(),
        num_visual_tokens=grid[0] * grid[1],
        grid=grid,
    )
    prompt = assemble_prompt([row], positions="gap", position_axes=3)
    return generate(
        backend, prompt, max_new_tokens=STEPS, eos_token_ids=(258, 256), keep_logits=True, **options
    )


def test_greedy_answers_with_all_tokens_equal_those_of_transformers(tiny):
    height, width = CANVASES["rows < cols"]
    recipe = Recipe.model_validate(plain_recipe(tiny.family, (height, width)))
    pruning = resolve_pruning(recipe, PruningRequest(keep_ratio=1.0))
    reference = build_reference(recipe, Checkpoint.of(tiny.folder), pruning, device="cpu")
    backend = TorchBackend(reference)
    prefix, suffix = stand_in_prompt(tiny.folder, "a big star")
    for seed in range(3):
        pixels = torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(seed))
        tiny.model.model.rope_deltas = None
        inputs = _inputs(pixels, prefix, suffix)
        with torch.inference_mode():
            theirs = tiny.model.generate(
                **inputs, do_sample=False, max_new_tokens=STEPS, eos_token_id=[258, 256],
                pad_token_id=256,
            )[0, inputs["input_ids"].shape[1] :].tolist()  # fmt: skip
        ours = _ours(backend, reference, pixels, prefix, suffix).token_ids[0]
        assert list(ours) == theirs
