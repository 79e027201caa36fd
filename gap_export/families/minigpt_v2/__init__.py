"""MiniGPT-v2: EVA tower whose patches are joined by four, one linear layer, Llama-2 decoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import RecipeError
from gap_export.families.common.checkpoints.configs import select_index
from gap_export.families.common.checkpoints.whole import WholeLayout
from gap_export.families.common.components import (
    assemble,
    decoder_component,
    embedding_component,
)
from gap_export.families.common.modules.expected import expected_language, prefixed
from gap_export.families.common.reference import Device, Layout, ModelSource, Reference
from gap_export.families.common.vision_components import vision_components
from gap_export.families.minigpt_v2.eva_vision import EvaVisionTower
from gap_export.families.minigpt_v2.published import MiniGptV2Layout
from gap_export.spec.architecture import Architecture
from gap_export.spec.manifest import GridSpec, PruningSpec
from gap_export.spec.recipe import Recipe


class MiniGptV2Family:
    """See :class:`gap_export.families.common.reference.Family`."""

    name = "minigpt_v2"
    layouts: Sequence[Layout]

    def __init__(self) -> None:
        self.layouts = (
            MiniGptV2Layout(),
            WholeLayout(family=self.name, expected_tensors=self.expected_tensors),
        )

    def expected_tensors(self, architecture: Architecture) -> Mapping[str, tuple[int, ...]]:
        """Tower (``ln_vision`` is ``tower.post_layernorm``), projector, decoder."""
        with torch.device("meta"):
            tower = _tower(architecture, num_layers=architecture.vision.num_layers)
        return prefixed("tower.", tower) | expected_language(architecture)

    def build(
        self,
        recipe: Recipe,
        source: ModelSource,
        checkpoint: Checkpoint,  # noqa: ARG002 - no text tower to look for
        pruning: PruningSpec,
        *,
        dtype: str,
        device: Device,
    ) -> Reference:
        """See :func:`gap_export.families.build_reference`."""
        architecture = source.architecture
        _check_grid(recipe, architecture)
        with torch.device("meta"):
            tower = _tower(architecture, num_layers=select_index(recipe, architecture.vision))
            components = [
                *vision_components(tower, source, pruning, recipe=recipe, text=None, dtype=dtype),
                embedding_component(source, dtype=dtype),
                decoder_component(source, dtype=dtype),
            ]
        return assemble(
            components,
            source,
            recipe=recipe,
            pruning=pruning,
            text=None,
            dtype=dtype,
            device=device,
        )


MINIGPT_V2 = MiniGptV2Family()


def _tower(architecture: Architecture, *, num_layers: int) -> EvaVisionTower:
    return EvaVisionTower(
        architecture.vision, num_layers=num_layers, join=_patches_per_token(architecture)
    )


def _patches_per_token(architecture: Architecture) -> int:
    """How many patches the projector takes for one token.

    Raises:
        RecipeError: no whole number of them, or one that does not divide a row.
    """
    width, side = architecture.vision.width, architecture.vision.grid_size
    join, rest = divmod(architecture.projector.width, width)
    if rest or not join or side % join:
        raise RecipeError(
            "the projector does not take whole patches of one row",
            seen=f"width {architecture.projector.width}",
            allowed=f"{width}, the tower's width, times a divisor of {side}, its patches in a row",
        )
    return join


def _check_grid(recipe: Recipe, architecture: Architecture) -> None:
    side = architecture.vision.grid_size
    wanted = GridSpec(rows=side, cols=side // _patches_per_token(architecture))
    if recipe.grid != wanted:
        raise RecipeError(
            f"recipe {recipe.name}: grid is not that of the model's tokens",
            seen=f"{recipe.grid.rows} rows, {recipe.grid.cols} columns",
            allowed=f"{wanted.rows} rows, {wanted.cols} columns",
        )
