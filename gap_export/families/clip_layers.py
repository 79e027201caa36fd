"""CLIP's transformer layer, shared by its vision and text towers.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers.activations import ACT2FN


@dataclass(frozen=True, kw_only=True)
class ClipShape:
    """What of a CLIP tower's config its layers read."""

    width: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    layer_norm_eps: float
    activation: str


class ClipEncoder(nn.Module):
    """The stack of layers, named as in the checkpoints: ``encoder.layers.N``.

    Args:
        shape: The tower's.
        num_layers: How many of its layers to have.
    """

    def __init__(self, shape: ClipShape, *, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_Layer(shape) for _ in range(num_layers)])

    def forward(
        self, hidden: torch.Tensor, allowed: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the layers.

        Args:
            hidden: [B, T, D].
            allowed: bool [T, T], query by key; None lets everyone see everyone.

        Returns:
            hidden states [B, T, D], and the last layer's attention weights [B, heads, T, T] (None
            where there are no layers). Weights that nobody reads leave no trace in an export.
        """
        weights = None
        for layer in self.layers:
            hidden, weights = layer(hidden, allowed)
        return hidden, weights


class _Layer(nn.Module):
    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.layer_norm1 = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)
        self.mlp = _Mlp(shape)
        self.layer_norm2 = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)

    def forward(
        self, hidden: torch.Tensor, allowed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        attended, weights = self.self_attn(self.layer_norm1(hidden), allowed)
        hidden = hidden + attended
        return hidden + self.mlp(self.layer_norm2(hidden)), weights


class _Attention(nn.Module):
    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.q_proj = nn.Linear(shape.width, shape.width)
        self.k_proj = nn.Linear(shape.width, shape.width)
        self.v_proj = nn.Linear(shape.width, shape.width)
        self.out_proj = nn.Linear(shape.width, shape.width)

    def forward(
        self, hidden: torch.Tensor, allowed: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        query = self._heads(self.q_proj(hidden))
        key = self._heads(self.k_proj(hidden))
        value = self._heads(self.v_proj(hidden))
        scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[3] ** -0.5
        if allowed is not None:
            scores = torch.where(allowed, scores, torch.finfo(scores.dtype).min)
        weights = torch.softmax(scores, dim=-1)
        merged = torch.matmul(weights, value).transpose(1, 2).reshape(hidden.shape)
        return self.out_proj(merged), weights

    def _heads(self, projected: torch.Tensor) -> torch.Tensor:
        batch, length, width = projected.shape
        head = width // self.num_heads
        return projected.reshape(batch, length, self.num_heads, head).transpose(1, 2)


class _Mlp(nn.Module):
    def __init__(self, shape: ClipShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.intermediate_size)
        self.fc2 = nn.Linear(shape.intermediate_size, shape.width)
        self.activation_fn = ACT2FN[shape.activation]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.fc2(self.activation_fn(self.fc1(hidden)))
        return projected
