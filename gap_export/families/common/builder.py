"""Builds the models that consist of a vision tower, a projector and a decoder: all so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import RecipeError
from gap_export.families.common.checkpoints.clip_text_tower import read_text_tower
from gap_export.families.common.checkpoints.configs import select_index
from gap_export.families.common.checkpoints.random_weights import random_text_tower
from gap_export.families.common.components import (
    assemble,
    decoder_component,
    embedding_component,
    text_component,
)
from gap_export.families.common.decoder_kind import LLAMA, DecoderKind
from gap_export.families.common.modules.expected import (
    NEWLINE_KEY,
    Shapes,
    expected_language,
    prefixed,
)
from gap_export.families.common.reference import (
    Component,
    Device,
    Layout,
    ModelSource,
    Reference,
)
from gap_export.families.common.vision_components import vision_components
from gap_export.pruning import find_pruner
from gap_export.spec.architecture import Architecture
from gap_export.spec.manifest import PruningSpec
from gap_export.spec.preparations import SHARED, WITH_NEWLINE
from gap_export.spec.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class ModelBuilder:
    """How a family's checkpoints are read, and what its modules are.

    Attributes:
        layouts: How its checkpoints are stored; the first that recognizes one reads it.
        tower: Makes the first so many layers of the vision tower, a module from pixel_values to
            :class:`VisionFeatures` whose layers are a ``ModuleList`` called ``encoder.layers``.
        tower_constants: Values of the tower's non-persistent buffers, by name.
        never_run: Shapes of tensors that checkpoints hold and no tower runs, by our names.
        decoder: The decoder's kind.
        newline: Whether there is the vector that ends each row of tokens joined from tiles.
    """

    layouts: Sequence[Layout]
    tower: Callable[[Architecture, int], nn.Module]
    tower_constants: Callable[[Architecture], Mapping[str, torch.Tensor]] = lambda _: {}
    never_run: Callable[[Architecture], Shapes] = lambda _: {}
    decoder: DecoderKind = LLAMA
    newline: bool = False

    def expected_tensors(self, architecture: Architecture) -> Shapes:
        """Shape of every tensor of a model, by our names; those never run included."""
        with torch.device("meta"):
            tower = self.tower(architecture, architecture.vision.num_layers)
        expected = {**prefixed("tower.", tower), **self.never_run(architecture)}
        expected |= expected_language(architecture, self.decoder)
        if self.newline:
            expected[NEWLINE_KEY] = (architecture.decoder.hidden_size,)
        return expected

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
        self._check_tiles(recipe)
        vision = source.architecture.vision
        reads = find_pruner(pruning.pruner).reads
        text = None
        if "text" in reads:
            seed = checkpoint.random_seed
            text = (
                read_text_tower(recipe, checkpoint, vision_width=vision.width)
                if seed is None
                else random_text_tower(recipe, vision_width=vision.width, seed=seed)
            )
        with torch.device("meta"):
            tower = self.tower(source.architecture, select_index(recipe, vision))
            vision_encoder, *token_pruner = vision_components(
                tower, source, pruning, recipe=recipe, text=text, dtype=dtype
            )
            components = [
                self._with_constants(vision_encoder, source.architecture),
                *token_pruner,
                *([text_component(text, dtype=dtype)] if text is not None else []),
                embedding_component(source, dtype=dtype),
                decoder_component(source, self.decoder, dtype=dtype, attention=pruning.attention),
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

    def _with_constants(self, vision_encoder: Component, architecture: Architecture) -> Component:
        found = self.tower_constants(architecture).items()
        named = {f"tower.{name}": value.numpy() for name, value in found}
        return replace(vision_encoder, constants={**vision_encoder.constants, **named})

    def _check_tiles(self, recipe: Recipe) -> None:
        """The vector that ends rows of tiles goes with a preparation that has use for it.

        Raises:
            RecipeError: the recipe has one, its family the other.
        """
        if recipe.image.has_newlines != self.newline:
            fitting = WITH_NEWLINE if self.newline else SHARED.keys() - WITH_NEWLINE
            raise RecipeError(
                f"recipe {recipe.name}: image.preparation does not fit family {recipe.family}",
                seen=recipe.image.preparation,
                allowed=" or ".join(sorted(fitting)),
            )
