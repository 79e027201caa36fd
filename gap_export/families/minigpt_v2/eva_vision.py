"""EVA's ViT-g as MiniGPT-v2 uses it, with neighboring patches joined to one token.

The layers are CLIP's (norm before attention and MLP, separate projections), so CLIP's code runs
them. What differs: the patch projection has a bias, no norm stands before the first layer, the norm
behind the last one (``ln_vision`` in BLIP-2's code) belongs to the features, and each token is
``join`` patches side by side.

Shape letters: I images, G patches along one side, J patches to a token, N = G * G / J tokens,
D width of a patch.
"""

from __future__ import annotations

import torch
from torch import nn

from gap_export.families.common.modules.clip_layers import ClipEncoder
from gap_export.families.common.modules.clip_vision import ClipEmbeddings
from gap_export.families.common.modules.joining import join_patches
from gap_export.families.common.modules.pruned_vision import VisionFeatures
from gap_export.spec.architecture import VisionShape

# The norm behind the tower has this; the layers' own is the shape's (1e-6 in EVA).
_FINAL_NORM_EPS = 1e-5


class EvaVisionTower(nn.Module):
    """The tower. Weight names are CLIP's, ``post_layernorm`` being ``ln_vision``.

    Args:
        shape: The tower's, of square images; J divides G, so that no token reaches over the end of
            a row.
        num_layers: How many layers to run.
        join: J.
    """

    def __init__(self, shape: VisionShape, *, num_layers: int, join: int = 4) -> None:
        super().__init__()
        self.join, self.grid = join, shape.patch_grid
        self.embeddings = ClipEmbeddings(shape, bias=True)
        self.encoder = ClipEncoder(shape, num_layers=num_layers)
        self.post_layernorm = nn.LayerNorm(shape.width, eps=_FINAL_NORM_EPS)

    def forward(self, pixel_values: torch.Tensor) -> VisionFeatures:
        """Features of joined patches: a grid of G rows and G / J columns.

        CLS is as wide as one patch, so it is repeated J times: its cosine with a token then weighs
        all of the token's patches alike. Attention to a token, of CLS or of all, is the mean over
        its patches, and its key is theirs, side by side. All are our choice; the model itself drops
        CLS.

        Args:
            pixel_values: float [I, 3, h, w].

        Returns:
            patches [I, N, J * D], cls [I, J * D], cls_attention and
            received_attention [I, N], keys [I, N, J * d].
        """
        hidden, attended = self.encoder(self.embeddings(pixel_values))
        assert attended is not None, "a tower has layers"
        weights, hidden = attended.weights, self.post_layernorm(hidden)
        return VisionFeatures(
            patches=self._joined(hidden[:, 1:]).flatten(2),
            cls=hidden[:, 0].repeat(1, self.join),
            cls_attention=self._joined(weights[:, :, 0, 1:].mean(dim=1)).mean(dim=2),
            received_attention=lambda: self._joined(weights.mean(dim=(1, 2))[:, 1:]).mean(dim=2),
            keys=self._joined(attended.keys[:, :, 1:].mean(dim=1)).flatten(2),
        )

    def _joined(self, per_patch: torch.Tensor) -> torch.Tensor:
        """[I, G * G, ...] to [I, N, J, ...]: patches that follow each other in a row."""
        return join_patches(per_patch, self.grid, (1, self.join))
