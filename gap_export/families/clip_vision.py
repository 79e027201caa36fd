"""CLIP's vision tower up to the select layer, the pruner behind it, and the projector.

Shape letters: I images, B rows (I is 1 or B), N patches, K kept, D vision features, E CLIP
embedding, H the decoder's hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN

from gap_export.families.clip_layers import ClipEncoder, ClipShape
from gap_export.manifest import PruningSpec
from gap_export.pruning import FixedPruner, Pruner, ScoringPruner, VisionState
from gap_export.pruning.select import gather_tokens, select_tokens


@dataclass(frozen=True, kw_only=True)
class ClipVisionShape(ClipShape):
    """A vision tower: square pictures of ``image_size`` pixels, square patches."""

    image_size: int
    patch_size: int

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


class ClipEmbeddings(nn.Module):
    """Patches and CLS with their positions."""

    def __init__(self, shape: ClipVisionShape) -> None:
        super().__init__()
        width, patch = shape.width, shape.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=patch, stride=patch, bias=False)
        self.position_embedding = nn.Embedding(shape.grid_size**2 + 1, width)

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
        with_post_layernorm: Whether CLIP's final norm is needed (for the joint space).
    """

    def __init__(
        self, shape: ClipVisionShape, *, num_layers: int, with_post_layernorm: bool
    ) -> None:
        super().__init__()
        self.embeddings = ClipEmbeddings(shape)
        # Spelt as in every CLIP checkpoint.
        self.pre_layrnorm = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)
        self.encoder = ClipEncoder(shape, num_layers=num_layers)
        if with_post_layernorm:
            self.post_layernorm = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features at the last layer run, and CLS's attention in it.

        Args:
            pixel_values: float [I, 3, h, w].

        Returns:
            hidden states [I, 1 + N, D], and attention of CLS to the patches, averaged over the
            heads, [I, N].
        """
        hidden, weights = self.encoder(self.pre_layrnorm(self.embeddings(pixel_values)))
        assert weights is not None, "the select layer is the first or a later one"
        return hidden, weights[:, :, 0, 1:].mean(dim=1)


@dataclass(frozen=True, kw_only=True)
class ProjectorShape:
    """The projector's config: D is ``width``, H is ``hidden_size``."""

    width: int
    hidden_size: int
    bias: bool
    activation: str


class Projector(nn.Module):
    """LLaVA-1.5's two-layer MLP, ``mlp2x_gelu``."""

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(shape.width, shape.hidden_size, bias=shape.bias)
        self.act = ACT2FN[shape.activation]
        self.linear_2 = nn.Linear(shape.hidden_size, shape.hidden_size, bias=shape.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[..., D] to [..., H]."""
        projected: torch.Tensor = self.linear_2(self.act(self.linear_1(features)))
        return projected


class PrunedVisionEncoder(nn.Module):
    """Tower, selection, projection of the survivors alone.

    Args:
        tower: Stops at the select layer.
        projector: Into the decoder's space.
        visual_projection: Into CLIP's joint space; None unless the pruner reads the text.
        pruner: Who survives.
        pruning: How many, and in which order.
    """

    fixed_places: torch.Tensor

    def __init__(
        self,
        *,
        tower: ClipVisionTower,
        projector: Projector,
        visual_projection: nn.Linear | None,
        pruner: Pruner,
        pruning: PruningSpec,
    ) -> None:
        super().__init__()
        self.tower = tower
        self.projector = projector
        self.visual_projection = visual_projection
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
            pixel_values: float32 [I, 3, h, w].
            text_embeds: float [B, E], where the pruner reads the text; I is then 1 or B.

        Returns:
            image_features [B, K, H] and keep_indices int64 [B, K] (B = I without text).
        """
        hidden, cls_attention = self.tower(pixel_values)
        if text_embeds is not None:
            hidden = _one_picture_per_row(hidden, text_embeds)
            cls_attention = _one_picture_per_row(cls_attention, text_embeds)
        patches = hidden[:, 1:]
        if isinstance(self.pruner, ScoringPruner):
            state = VisionState(
                patch_features=patches,
                cls_features=hidden[:, 0],
                cls_attention=cls_attention,
                patch_embeds=self._joint_space(patches),
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
        features = self.projector(gather_tokens(patches, keep))
        # A graph's output may not be a view of a constant.
        return features, keep.clone()

    def _joint_space(self, patches: torch.Tensor) -> torch.Tensor | None:
        if self.visual_projection is None:
            return None
        embeds: torch.Tensor = self.visual_projection(self.tower.post_layernorm(patches))
        return embeds


def _one_picture_per_row(per_image: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """[I, ...] to [B, ...]: the only picture for every row, or each row its own."""
    rows = torch.arange(text_embeds.shape[0], device=per_image.device)
    return per_image.index_select(0, rows.clamp(max=per_image.shape[0] - 1))
