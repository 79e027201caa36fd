"""Models without a checkpoint: of the true sizes, the same from the same seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import UsageError
from gap_export.families import (
    build_reference,
    find_family,
    load_builder,
    read_source,
    resolve_pruning,
)
from gap_export.families.common.reference import Reference
from gap_export.spec.recipe import Recipe, load_recipe
from gap_export.spec.requests import PruningRequest
from tests.families.tiny_llava_next import write_llava_next


@pytest.fixture(scope="module", params=["llava", "llava_next"])
def recipe(request, tmp_path_factory, tiny_checkpoint) -> Recipe:
    """A recipe that says the sizes of a tiny checkpoint."""
    folder = tiny_checkpoint
    if request.param == "llava_next":
        folder = tmp_path_factory.mktemp("next") / "mistral"
        write_llava_next(folder, decoder="mistral")
    recipe = load_recipe(folder / "recipe.yaml")
    sizes = read_source(recipe, Checkpoint.of(folder)).architecture
    tokens = {"<s>": 1, "</s>": 2, "<image>": 3}
    return recipe.model_copy(update={"architecture": sizes, "special_tokens": tokens})


def drawn(recipe: Recipe, seed: int = 0, pruner: str = "cls", **options: Any) -> Reference:
    pruning = resolve_pruning(recipe, PruningRequest(pruner=pruner, keep_ratio=0.3, order="raster"))
    checkpoint = Checkpoint(parts={}, random_seed=seed)
    return build_reference(recipe, checkpoint, pruning, **({"device": "cpu"} | options))


def tensors(ref: Reference) -> list[torch.Tensor]:
    return [t for c in ref.components for t in c.module.state_dict().values()]


def test_it_is_a_whole_model_in_half_precision(recipe):
    ref, source = drawn(recipe), read_source(recipe, Checkpoint(parts={}, random_seed=0))
    assert (ref.dtype, ref.checkpoint_files) == ("float16", ())
    assert ref.image_token_id == 3
    expected = load_builder(find_family(recipe)).expected_tensors(recipe.architecture)
    assert {key: weight.shape for key, weight in source.weights.items()} == dict(expected)
    assert (ref.newline is not None) == (recipe.image.tiles is not None)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        features, keep, *_ = ref.vision_encoder(pixels)
    assert torch.isfinite(features).all() and features.std() > 0
    assert keep.shape == (2, 5)


def test_seed_decides(recipe):
    first, again, other = (tensors(drawn(recipe, seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    differing = [not torch.equal(a, b) for a, b in zip(first, other, strict=True)]
    # All but the weights of norms.
    assert sum(differing) > len(differing) / 2


def test_no_two_tensors_are_alike(recipe):
    matrices = [t for t in tensors(drawn(recipe)) if t.ndim == 2]
    assert len({tuple(t.flatten()[:32].tolist()) for t in matrices}) == len(matrices)


def test_meta_model_draws_nothing(recipe, monkeypatch):
    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("a weight was drawn")

    monkeypatch.setattr("gap_export.checkpoint.weights.weight.DerivedWeight.load", forbidden)
    with pytest.raises(AssertionError, match="a weight was drawn"):
        drawn(recipe)
    assert all(tensor.is_meta for tensor in tensors(drawn(recipe, device="meta")))


def test_recipe_without_sizes_is_refused(recipe):
    with pytest.raises(UsageError, match=r"does not say its sizes.*random-weights"):
        drawn(recipe.model_copy(update={"architecture": None}), device="meta")


def test_text_tower_without_sizes_is_refused(tiny_recipe, recipe):
    with_tower = recipe.model_copy(update={"text_tower": tiny_recipe.text_tower})
    with pytest.raises(UsageError, match=r"sizes of its text tower.*reads no text"):
        drawn(with_tower, pruner="text", device="meta")
