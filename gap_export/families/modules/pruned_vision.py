"""What every family's vision encoder is: a tower, the pruner behind it, and the projector.

Shape letters: I pictures, B rows (I is 1 or B), N visual tokens, K kept, D vision features, E CLIP
embedding, H the decoder's hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from gap_export.manifest import PruningSpec
from gap_export.pruning import FixedPruner, Pruner, ScoringPruner, VisionState
from gap_export.pruning.select import gather_tokens, select_tokens


class VisionFeatures(NamedTuple):
    """What a tower gives.

    Attributes:
        patches: float [I, N, D], at the select layer, raster order of the grid.
        cls: float [I, D], of the CLS token at the same layer.
        cls_attention: float [I, N], attention of CLS to each, averaged over the heads, in the layer
            that produced the features.
    """

    patches: torch.Tensor
    cls: torch.Tensor
    cls_attention: torch.Tensor


class JointSpace(nn.Module):
    """Vision features into CLIP's joint space with texts: final norm, then projection."""

    def __init__(self, *, width: int, embed_dim: int, eps: float) -> None:
        super().__init__()
        self.post_layernorm = nn.LayerNorm(width, eps=eps)
        self.visual_projection = nn.Linear(width, embed_dim, bias=False)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """[B, N, D] to [B, N, E]."""
        batch, length, width = patches.shape
        flat = self.post_layernorm(patches.reshape(-1, width))
        embeds: torch.Tensor = self.visual_projection(flat)
        return embeds.reshape(batch, length, -1)


class PrunedVisionEncoder(nn.Module):
    """Tower, selection, projection of the survivors alone.

    Args:
        tower: pixel_values to :class:`VisionFeatures`.
        projector: [..., D] to [..., H].
        joint_space: None unless the pruner reads the text.
        pruner: Who survives.
        pruning: How many, and in which order.
    """

    fixed_places: torch.Tensor

    def __init__(
        self,
        *,
        tower: nn.Module,
        projector: nn.Module,
        joint_space: JointSpace | None,
        pruner: Pruner,
        pruning: PruningSpec,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.projector = projector
        self.joint_space = joint_space
        self.pruner = pruner
        self.pruning = pruning
        if isinstance(pruner, FixedPruner):
            places = torch.empty(pruning.num_kept_tokens, dtype=torch.int64)
            self.register_buffer("fixed_places", places, persistent=False)

    def forward(
        self, pixel_values: torch.Tensor, text_embeds: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode and prune.

        Args:
            pixel_values: float32 [I, 3, h, w], whatever the weights' dtype.
            text_embeds: float [B, E], where the pruner reads the text; I is then 1 or B.

        Returns:
            image_features [B, K, H] and keep_indices int64 [B, K] (B = I without text).
        """
        features: VisionFeatures = self.tower(pixel_values.to(self._dtype))
        if text_embeds is not None:
            features = VisionFeatures(*(_one_per_row(part, text_embeds) for part in features))
        patches = features.patches
        if isinstance(self.pruner, ScoringPruner):
            state = VisionState(
                patch_features=patches,
                cls_features=features.cls,
                cls_attention=features.cls_attention,
                patch_embeds=None if self.joint_space is None else self.joint_space(patches),
                text_embeds=text_embeds,
                text_similarity_sign=self.pruning.text_similarity_sign or 1,
            )
            keep = select_tokens(
                self.pruner.scores(state),
                num_kept_tokens=self.pruning.num_kept_tokens,
                order=self.pruning.order,
            )
        else:
            keep = self.fixed_places.expand(patches.shape[0], -1)
        projected = self.projector(gather_tokens(patches, keep))
        # A graph's output may not be a view of a constant.
        return projected, keep.clone()

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.tower.parameters()).dtype


def _one_per_row(per_image: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """[I, ...] to [B, ...]: the only picture for every row, or each row its own."""
    rows = torch.arange(text_embeds.shape[0], device=per_image.device)
    return per_image.index_select(0, rows.clamp(max=per_image.shape[0] - 1))
