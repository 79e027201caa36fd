"""CLIP's vision tower up to the select layer.

Shape letters: I images, N patches, D vision features.
"""

from __future__ import annotations

import torch
from torch import nn

from gap_export.families.common.modules.clip_layers import ClipEncoder
from gap_export.families.common.modules.pruned_vision import VisionFeatures
from gap_export.spec.architecture import VisionShape


class ClipEmbeddings(nn.Module):
    """Patches and CLS with their positions."""

    def __init__(self, shape: VisionShape, *, bias: bool = False) -> None:
        super().__init__()
        width, patch = shape.width, shape.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=bias)
        self.position_embedding = nn.Embedding(shape.num_patches + 1, width)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Float [I, 3, h, w] to [I, 1 + N, D], CLS first, patches in raster order."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(patches.shape[0], 1, -1)
        return torch.cat((cls, patches), dim=1) + self.position_embedding.weight


class ClipVisionTower(nn.Module):
    """The tower's first layers. Weight names are those of CLIP's ``vision_model``.

    Args:
        shape: The tower's.
        num_layers: How many layers to run; what lies beyond the select layer is never run.
    """

    def __init__(self, shape: VisionShape, *, num_layers: int) -> None:
        super().__init__()
        self.embeddings = ClipEmbeddings(shape)
        # Spelt as in every CLIP checkpoint.
        self.pre_layrnorm = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)
        self.encoder = ClipEncoder(shape, num_layers=num_layers)

    def forward(self, pixel_values: torch.Tensor) -> VisionFeatures:
        """Features at the last layer run, its attention and keys.

        Args:
            pixel_values: float [I, 3, h, w].
        """
        hidden, attended = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))
        assert attended is not None, "the select layer is the first or a later one"
        weights = attended.weights
        return VisionFeatures(
            patches=hidden[:, 1:],
            cls=hidden[:, 0],
            cls_attention=weights[:, :, 0, 1:].mean(dim=1),
            received_attention=lambda: weights.mean(dim=(1, 2))[:, 1:],
            keys=attended.keys[:, :, 1:].mean(dim=1),
        )
