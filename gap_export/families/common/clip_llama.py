"""What LLaVA, LLaVA-1.6 and Shikra share: CLIP tower, projector, Llama decoder.

What tells them apart is data: sizes, projector, prompt, picture preparation, and how their
checkpoints are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import RecipeError
from gap_export.families.common.checkpoints.clip_text_tower import TextTowerSource, read_text_tower
from gap_export.families.common.checkpoints.configs import select_index
from gap_export.families.common.checkpoints.random_weights import random_text_tower
from gap_export.families.common.components import (
    assemble,
    decoder_component,
    embedding_component,
    text_component,
)
from gap_export.families.common.modules.clip_vision import ClipVisionTower
from gap_export.families.common.modules.expected import NEWLINE_KEY, expected_clip_llama
from gap_export.families.common.reference import Device, Layout, ModelSource, Reference
from gap_export.families.common.vision_components import vision_components
from gap_export.pruning import find_pruner
from gap_export.spec.architecture import Architecture
from gap_export.spec.manifest import PruningSpec
from gap_export.spec.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class ClipLlamaFamily:
    """See :class:`gap_export.families.common.reference.Family`.

    Attributes:
        newline: Whether there is the vector that ends each row of a tiled picture.
    """

    name: str
    layouts: Sequence[Layout]
    newline: bool = False

    def expected_tensors(self, architecture: Architecture) -> Mapping[str, tuple[int, ...]]:
        """Tower, projector, decoder, and the newline where there is one."""
        return expected_clip_llama(architecture, newline=self.newline)

    def build(
        self,
        recipe: Recipe,
        source: ModelSource,
        checkpoint: Checkpoint,
        pruning: PruningSpec,
        *,
        dtype: str,
        device: Device,
    ) -> Reference:
        """See :func:`gap_export.families.build_reference`."""
        _check_tiles(recipe, source)
        architecture = source.architecture
        reads = find_pruner(pruning.pruner).reads
        text = _text_tower(recipe, source, checkpoint) if "text" in reads else None
        with torch.device("meta"):
            tower = ClipVisionTower(
                architecture.vision, num_layers=select_index(recipe, architecture.vision)
            )
            components = [
                *vision_components(tower, source, pruning, recipe=recipe, text=text, dtype=dtype),
                *([text_component(text, dtype=dtype)] if text is not None else []),
                embedding_component(source, dtype=dtype),
                decoder_component(source, dtype=dtype),
            ]
        return assemble(
            components,
            source,
            recipe=recipe,
            pruning=pruning,
            text=text,
            dtype=dtype,
            device=device,
        )


def _check_tiles(recipe: Recipe, source: ModelSource) -> None:
    """Tiles and the vector that ends their rows go together.

    Raises:
        RecipeError: the recipe has one, its family the other.
    """
    if (recipe.image.tiles is not None) != (NEWLINE_KEY in source.weights):
        raise RecipeError(
            f"recipe {recipe.name}: image.preparation does not fit family {recipe.family}",
            seen=recipe.image.preparation,
            allowed="anyres" if recipe.image.tiles is None else "pad or squash",
        )


def _text_tower(recipe: Recipe, source: ModelSource, checkpoint: Checkpoint) -> TextTowerSource:
    width = source.architecture.vision.width
    if checkpoint.random_seed is not None:
        return random_text_tower(recipe, vision_width=width, seed=checkpoint.random_seed)
    return read_text_tower(recipe, checkpoint, vision_width=width)
