"""The decoder of Llama, Mistral, Qwen2 and Qwen3: what differs between them is in the shape.

Shape letters: B rows, S fed tokens, H hidden, d head width.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from gap_export.families.common.modules.attention import (
    Rotation,
    attend,
    rotate,
    split_heads,
)
from gap_export.families.common.modules.decoder_stack import DecoderStack
from gap_export.families.common.modules.norms import RmsNorm
from gap_export.spec.architecture import DecoderShape


class LlamaDecoder(DecoderStack):
    """See :class:`DecoderStack`. Weight names are those of ``LlamaForCausalLM``'s parts."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__(
            shape,
            layers=[_Layer(shape) for _ in range(shape.num_layers)],
            norm=RmsNorm(shape.hidden_size, eps=shape.rms_norm_eps),
        )


class _Layer(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.mlp = _Mlp(shape)
        self.input_layernorm = RmsNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.post_attention_layernorm = RmsNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        size: tuple[int, int],
        bias: torch.Tensor,
        rotation: Rotation,
        past: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normal = self.input_layernorm(hidden)
        attended, key, value = self.self_attn(normal, size, bias, rotation, past)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), key, value


class _Attention(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        width, bias = shape.num_heads * shape.head_dim, bool(shape.attention_bias)
        key_value_width = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(shape.hidden_size, key_value_width, bias=bias)
        self.v_proj = nn.Linear(shape.hidden_size, key_value_width, bias=bias)
        self.o_proj = nn.Linear(width, shape.hidden_size, bias=shape.attention_bias is True)
        if shape.qk_norm:
            self.q_norm = RmsNorm(shape.head_dim, eps=shape.rms_norm_eps)
            self.k_norm = RmsNorm(shape.head_dim, eps=shape.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        size: tuple[int, int],
        bias: torch.Tensor,
        rotation: Rotation,
        past: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = self.shape
        heads, groups, width = shape.num_heads, shape.num_key_value_heads, shape.head_dim
        query = split_heads(self.q_proj(hidden), size, heads, width)
        query = rotate(self.q_norm(query) if shape.qk_norm else query, rotation, shape.rotary_dim)
        key = split_heads(self.k_proj(hidden), size, groups, width)
        key = rotate(self.k_norm(key) if shape.qk_norm else key, rotation, shape.rotary_dim)
        value = split_heads(self.v_proj(hidden), size, groups, width)
        merged, key, value = attend(query, key, value, past, bias, shape)
        return self.o_proj(merged), key, value


class _Mlp(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        inner, bias = shape.intermediate_size, shape.mlp_bias
        self.gate_proj = nn.Linear(shape.hidden_size, inner, bias=bias)
        self.up_proj = nn.Linear(shape.hidden_size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, shape.hidden_size, bias=bias)
        self.act_fn = ACT2FN[shape.activation]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gated = self.act_fn(self.gate_proj(hidden)) * self.up_proj(hidden)
        projected: torch.Tensor = self.down_proj(gated)
        return projected
