"""From vision features to the decoder's hidden size."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from gap_export.spec.architecture import ProjectorShape


def build_projector(shape: ProjectorShape) -> nn.Module:
    """The projector of that shape: one linear layer, or two with an activation between."""
    return LinearProjector(shape) if shape.activation is None else MlpProjector(shape)


class MlpProjector(nn.Module):
    """LLaVA-1.5's two-layer MLP, ``mlp2x_gelu``."""

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        assert shape.activation is not None
        self.linear_1 = nn.Linear(shape.width, shape.hidden_size, bias=shape.bias)
        self.act = ACT2FN[shape.activation]
        self.linear_2 = nn.Linear(shape.hidden_size, shape.hidden_size, bias=shape.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, K, D] to [B, K, H]."""
        batch, length, width = features.shape
        hidden = self.act(self.linear_1(features.reshape(-1, width)))
        projected: torch.Tensor = self.linear_2(hidden)
        return projected.reshape(batch, length, -1)


class LinearProjector(nn.Module):
    """One linear layer, as in Shikra and MiniGPT-v2."""

    def __init__(self, shape: ProjectorShape) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(shape.width, shape.hidden_size, bias=shape.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, K, D] to [B, K, H]."""
        batch, length, width = features.shape
        projected: torch.Tensor = self.linear_1(features.reshape(-1, width))
        return projected.reshape(batch, length, -1)
