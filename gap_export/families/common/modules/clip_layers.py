"""CLIP's transformer layer, shared by its vision and text towers.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn
from transformers.activations import ACT2FN

from gap_export.spec.architecture import TransformerShape


class Attended(NamedTuple):
    """What a layer's attention computed on the way.

    Attributes:
        weights: float [B, heads, T, T], query by key.
        keys: float [B, heads, T, d], d = D / heads.
    """

    weights: torch.Tensor
    keys: torch.Tensor


class ClipEncoder(nn.Module):
    """The stack of layers, named as in the checkpoints: ``encoder.layers.N``.

    Args:
        shape: The tower's.
        num_layers: How many of its layers to have.
        layer_scale: Whether what attention and MLP add is scaled, channel by channel (CaiT, arXiv
            2103.17239). Kept apart from the weights before it, which so stay the checkpoint's.
    """

    def __init__(
        self, shape: TransformerShape, *, num_layers: int, layer_scale: bool = False
    ) -> None:
        super().__init__()
        kind = _ScaledLayer if layer_scale else _Layer
        self.layers = nn.ModuleList([kind(shape) for _ in range(num_layers)])

    def forward(
        self, hidden: torch.Tensor, bias: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, Attended | None]:
        """Run the layers.

        Args:
            hidden: [B, T, D].
            bias: float32 [T, T], query by key, see :func:`mask_bias`; None lets everyone see all.

        Returns:
            hidden states [B, T, D], and the last layer's attention (None where there are no
            layers). Parts of it that are not read leave no trace in an export.
        """
        batch, length, width = hidden.shape
        attended = None
        # A matrix between the steps of attention, for the same reason as in llama_decoder.
        flat = hidden.reshape(-1, width)
        for layer in self.layers:
            flat, attended = layer(flat, (batch, length), bias)
        return flat.reshape(batch, length, width), attended


class _Layer(nn.Module):
    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.layer_norm1 = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)
        self.mlp = _Mlp(shape)
        self.layer_norm2 = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)

    def forward(
        self, hidden: torch.Tensor, size: tuple[int, int], bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Attended]:
        merged, attended = self.self_attn(self.layer_norm1(hidden), size, bias)
        hidden = hidden + merged
        return hidden + self.mlp(self.layer_norm2(hidden)), attended


class _ScaledLayer(_Layer):
    def __init__(self, shape: TransformerShape) -> None:
        super().__init__(shape)
        self.layer_scale1 = nn.Parameter(torch.empty(shape.width))
        self.layer_scale2 = nn.Parameter(torch.empty(shape.width))

    def forward(
        self, hidden: torch.Tensor, size: tuple[int, int], bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Attended]:
        merged, attended = self.self_attn(self.layer_norm1(hidden), size, bias)
        hidden = hidden + merged * self.layer_scale1
        return hidden + self.mlp(self.layer_norm2(hidden)) * self.layer_scale2, attended


class _Attention(nn.Module):
    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.q_proj = nn.Linear(shape.width, shape.width)
        self.k_proj = nn.Linear(shape.width, shape.width)
        self.v_proj = nn.Linear(shape.width, shape.width)
        self.out_proj = nn.Linear(shape.width, shape.width)

    def forward(
        self, hidden: torch.Tensor, size: tuple[int, int], bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, Attended]:
        query = self._heads(self.q_proj(hidden), size)
        key = self._heads(self.k_proj(hidden), size)
        value = self._heads(self.v_proj(hidden), size)
        scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[3] ** -0.5
        # Cast first: softmax's own dtype argument is exported as a cast of its result.
        wide = scores.to(torch.float32)
        wide = wide if bias is None else wide + bias
        weights = torch.softmax(wide, dim=-1).to(scores.dtype)
        merged = torch.matmul(weights, value).transpose(1, 2).reshape(-1, hidden.shape[1])
        return self.out_proj(merged), Attended(weights, key)

    def _heads(self, projected: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """[B * T, D] to [B, heads, T, d]."""
        head = projected.shape[1] // self.num_heads
        return projected.reshape(*size, self.num_heads, head).transpose(1, 2)


class _Mlp(nn.Module):
    def __init__(self, shape: TransformerShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.width, shape.intermediate_size)
        self.fc2 = nn.Linear(shape.intermediate_size, shape.width)
        self.activation_fn = ACT2FN[shape.activation]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.fc2(self.activation_fn(self.fc1(hidden)))
        return projected
