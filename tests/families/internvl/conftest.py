"""Tiny InternVLs, and how they are asked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.families import Reference, build_reference, resolve_pruning
from gap_export.spec.recipe import Recipe, load_recipe
from gap_export.spec.requests import PruningRequest
from tests.families.tiny_internvl import write_internvl

# Form and decoder: each of either is there once.
KINDS = {"qwen2": "original", "qwen3": "hf"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Model:
    """One checkpoint, ours and transformers'."""

    folder: Path
    recipe: Recipe
    theirs: Any

    def reference(self, pruner: str = "spatial", keep_ratio: float = 1.0) -> Reference:
        request = PruningRequest(pruner=pruner, keep_ratio=keep_ratio, order="raster")
        pruning = resolve_pruning(self.recipe, request)
        return build_reference(self.recipe, Checkpoint.of(self.folder), pruning, device="cpu")


@pytest.fixture(scope="session", params=list(KINDS))
def model(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Model:
    from transformers import InternVLForConditionalGeneration

    folder = tmp_path_factory.mktemp("internvl")
    theirs = folder / "theirs"
    write_internvl(theirs, decoder=request.param)
    loaded = InternVLForConditionalGeneration.from_pretrained(theirs, attn_implementation="eager")
    ours = theirs
    if KINDS[request.param] == "original":
        ours = folder / "ours"
        write_internvl(ours, decoder=request.param, form="original")
    return Model(folder=ours, recipe=load_recipe(ours / "recipe.yaml"), theirs=loaded.eval())


def noise(size: tuple[int, int]) -> Image.Image:
    """An image of (width, height)."""
    pixels = np.random.default_rng(size).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def random_pixels(num_images: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_images, 3, 32, 32, generator=generator)
