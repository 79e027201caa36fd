"""LLaVA-1.5: CLIP tower with CLS, two-layer MLP projector, Llama decoder with RoPE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import LlavaConfig

from gap_export.architecture import Architecture
from gap_export.families.checkpoints.llava_hf import LlavaHfLayout
from gap_export.families.checkpoints.llava_lora import LlavaLoraLayout
from gap_export.families.checkpoints.llava_original import LlavaOriginalLayout
from gap_export.families.clip_llama import build_clip_llama, clip_readings
from gap_export.families.modules.expected import expected_clip_llama
from gap_export.families.reference import Device, Layout, ModelSource, Reference
from gap_export.manifest import PruningSpec
from gap_export.pruning import Reading
from gap_export.recipe import Recipe
from gap_export.source import Checkpoint


class LlavaFamily:
    """See :class:`gap_export.families.reference.Family`."""

    name = "llava"
    layouts: Sequence[Layout] = (
        LlavaHfLayout(name="llava-hf", config_class=LlavaConfig),
        LlavaOriginalLayout(name="llava-original"),
        LlavaLoraLayout(name="llava-lora"),
    )

    def readings(self, recipe: Recipe) -> frozenset[Reading]:
        """CLS is always there, the text tower where the recipe names one."""
        return clip_readings(recipe)

    def expected_tensors(self, architecture: Architecture) -> Mapping[str, tuple[int, ...]]:
        """Tower, projector, decoder."""
        return expected_clip_llama(architecture)

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
        return build_clip_llama(recipe, source, checkpoint, pruning, dtype=dtype, device=device)
