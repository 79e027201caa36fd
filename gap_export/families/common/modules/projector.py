"""From vision features to the decoder's hidden size.

Shape letters: B rows, K tokens, D features of a token, H the decoder's hidden size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from transformers.activations import ACT2FN

from gap_export.families.common.modules.norms import RmsNorm
from gap_export.spec.architecture import ProjectorShape


def build_projector(shape: ProjectorShape) -> nn.Module:
    """The projector of that shape: one linear layer, or two with an activation between."""
    if shape.num_taps:
        return TappedProjector(shape)
    return LinearProjector(shape) if shape.activation is None else MlpProjector(shape)


def embeds_of(projector: nn.Module, features: torch.Tensor) -> torch.Tensor:
    """What a pruner calls image_embeds, [B, N, H]: without the planes of taps."""
    if isinstance(projector, TappedProjector):
        features = features[..., : projector.width]
        projector = projector.main
    embeds: torch.Tensor = projector(features)
    return embeds


class _Projector(nn.Module):
    """The norm in front of a projector, if any."""

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        self.norm_width = shape.norm_width or shape.width
        if shape.norm is not None:
            kind = nn.LayerNorm if shape.norm == "layer_norm" else RmsNorm
            self.norm = kind(self.norm_width, eps=shape.norm_eps)

    def _normal(self, features: torch.Tensor) -> torch.Tensor:
        """[B, K, D] to a matrix [B * K, D]."""
        width = features.shape[2]
        if not hasattr(self, "norm"):
            return features.reshape(-1, width)
        normal: torch.Tensor = self.norm(features.reshape(-1, self.norm_width))
        return normal.reshape(-1, width)


class MlpProjector(_Projector):
    """Two layers: LLaVA-1.5's ``mlp2x_gelu``, InternVL's ``mlp1``, Qwen's merger."""

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__(shape)
        assert shape.activation is not None
        inner = shape.inner_size or shape.hidden_size
        self.linear_1 = nn.Linear(shape.width, inner, bias=shape.bias)
        self.act = ACT2FN[shape.activation]
        self.linear_2 = nn.Linear(inner, shape.hidden_size, bias=shape.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, K, D] to [B, K, H]."""
        batch, length, _ = features.shape
        hidden = self.act(self.linear_1(self._normal(features)))
        projected: torch.Tensor = self.linear_2(hidden)
        return projected.reshape(batch, length, -1)


class LinearProjector(_Projector):
    """One linear layer, as in Shikra and MiniGPT-v2."""

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__(shape)
        self.linear_1 = nn.Linear(shape.width, shape.hidden_size, bias=shape.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, K, D] to [B, K, H]."""
        batch, length, _ = features.shape
        projected: torch.Tensor = self.linear_1(self._normal(features))
        return projected.reshape(batch, length, -1)


class TappedProjector(nn.Module):
    """A projector for the tower's last features, and one for each tap (DeepStack, Qwen3-VL)."""

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        self.width = shape.width
        self.main = MlpProjector(shape)
        # A tap's norm is over all of a token, also where the main one's is not.
        tap = replace(shape, norm_width=None)
        self.taps = nn.ModuleList([MlpProjector(tap) for _ in range(shape.num_taps)])

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, K, (1 + taps) * D] to [B, K, (1 + taps) * H]."""
        planes = torch.split(features, self.width, dim=2)
        projected = [self.main(planes[0])]
        projected += [tap(plane) for tap, plane in zip(self.taps, planes[1:], strict=True)]
        return torch.cat(projected, dim=2)
