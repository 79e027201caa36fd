"""InternViT-300M, neighboring patches joined to one token (InternVL-1.5, arXiv 2404.16821).

The layers are CLIP's with layer scale. The patch projection has a bias; no norm stands before the
first layer, none behind the last. Each token is a block of patches, their features side by side,
row by row: what the authors call pixel shuffle, version 2.

Shape letters: I images, J patches to a token, N tokens, D width of a patch, d width of a head.
"""

from __future__ import annotations

import torch
from torch import nn

from gap_export.families.common.modules.clip_layers import ClipEncoder
from gap_export.families.common.modules.clip_vision import ClipEmbeddings
from gap_export.families.common.modules.joining import join_patches
from gap_export.families.common.modules.pruned_vision import VisionFeatures
from gap_export.spec.architecture import VisionShape


class InternVisionTower(nn.Module):
    """The tower. Weight names are CLIP's, and ``layer_scale1`` and ``layer_scale2`` of each layer.

    Args:
        shape: The tower's.
        num_layers: How many layers to run.
        joined: Rows and columns of patches in one token; they divide the grid of patches.
    """

    def __init__(self, shape: VisionShape, *, num_layers: int, joined: tuple[int, int]) -> None:
        super().__init__()
        self.grid, self.joined = shape.patch_grid, joined
        self.embeddings = ClipEmbeddings(shape, bias=True)
        self.encoder = ClipEncoder(shape, num_layers=num_layers, layer_scale=True)

    def forward(self, pixel_values: torch.Tensor) -> VisionFeatures:
        """Features of joined patches.

        What is known of single patches is pooled as follows, which is our choice, since the model
        itself drops CLS: attention to a token is the mean over its patches, its key is theirs side
        by side, and CLS is repeated, so that its cosine with a token weighs all patches alike.

        Args:
            pixel_values: float [I, 3, h, w].

        Returns:
            patches [I, N, J * D], keys [I, N, J * d], cls [I, J * D], cls_attention and
            received_attention [I, N].
        """
        hidden, attended = self.encoder(self.embeddings(pixel_values))
        assert attended is not None, "a tower has layers"
        weights = attended.weights
        down, across = self.joined
        return VisionFeatures(
            patches=self._joined(hidden[:, 1:]).flatten(2),
            keys=self._joined(attended.keys[:, :, 1:].mean(dim=1)).flatten(2),
            cls=hidden[:, 0].repeat(1, down * across),
            cls_attention=self._joined(weights[:, :, 0, 1:].mean(dim=1)).mean(dim=2),
            received_attention=lambda: self._joined(weights.mean(dim=(1, 2))[:, 1:]).mean(dim=2),
        )

    def _joined(self, per_patch: torch.Tensor) -> torch.Tensor:
        """Patches [I, R * C, ...] to those of each token, [I, N, J, ...]."""
        return join_patches(per_patch, self.grid, self.joined)
