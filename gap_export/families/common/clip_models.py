"""What LLaVA, LLaVA-1.6 and Shikra share: CLIP's tower, its final norm never run.

What tells them apart is data: sizes, projector, prompt, image preparation, and how their
checkpoints are stored.
"""

from __future__ import annotations

from torch import nn

from gap_export.families.common.builder import ModelBuilder
from gap_export.families.common.modules.clip_vision import ClipVisionTower
from gap_export.families.common.modules.expected import clip_norm_behind
from gap_export.families.common.reference import Layout
from gap_export.spec.architecture import Architecture


def clip_builder(*layouts: Layout) -> ModelBuilder:
    """A builder of models with CLIP's tower and a decoder of Llama's kind."""
    return ModelBuilder(
        layouts=layouts,
        tower=_tower,
        never_run=lambda architecture: clip_norm_behind(architecture.vision),
    )


def _tower(architecture: Architecture, num_layers: int) -> nn.Module:
    return ClipVisionTower(architecture.vision, num_layers=num_layers)
