"""A Llama decoder with explicit position ids and an explicit KV cache.

The forward is written out so that an export sees one plain graph: RoPE reads ``position_ids`` and
nothing else, the mask is a key mask over cache slots, the cache goes in and comes out.

Between attention's own steps the hidden state is a matrix, [B * S, H]: a linear layer on a matrix
is one ONNX Gemm that reads its weight as the checkpoint stores it. On three dimensions it would be
a MatMul by a transposed weight, and runtimes keep the transposed copy of every weight in memory.

Shape letters: B rows, S fed tokens, T = past + S slots, H hidden, V vocabulary, d head width.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from gap_export.spec.architecture import DecoderShape


class LlamaDecoder(nn.Module):
    """Layers, final norm and LM head. Weight names are those of ``LlamaForCausalLM``'s parts."""

    inv_freq: torch.Tensor

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList([_Layer(shape) for _ in range(shape.num_layers)])
        self.norm = RmsNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        # Not in any checkpoint: the family gives it its value.
        self.register_buffer("inv_freq", torch.empty(shape.head_dim // 2), persistent=False)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past_key_values: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """One step: prefill (past of length 0) or decode.

        Args:
            inputs_embeds: float [B, S, H].
            attention_mask: int64 [B, T], over cache slots; 0 hides a slot from every query. Zeros
                may lie anywhere.
            position_ids: int64 [B, S], what RoPE sees.
            *past_key_values: key and value of each layer in turn, float
                [B, key-value heads, past, d].

        Returns:
            logits [B, 1, V] of the last position, then key and value of each layer,
            [B, key-value heads, T, d].
        """
        past_length = past_key_values[0].shape[2]
        allowed = _allowed(attention_mask, num_queries=inputs_embeds.shape[1], past=past_length)
        rotation = self._rotation(position_ids, inputs_embeds.dtype)
        batch, length, width = inputs_embeds.shape
        hidden = inputs_embeds.reshape(-1, width)
        present: list[torch.Tensor] = []
        for index, layer in enumerate(self.layers):
            past = past_key_values[2 * index], past_key_values[2 * index + 1]
            hidden, key, value = layer(hidden, (batch, length), allowed, rotation, past)
            present += [key, value]
        last = hidden.reshape(batch, length, width)[:, -1]
        logits = self.lm_head(self.norm(last)).unsqueeze(1)
        return (logits, *present)

    def _rotation(
        self, position_ids: torch.Tensor, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin, [B, 1, S, d], worked out in float32 whatever ``dtype`` they end in."""
        ids = position_ids.to(torch.float32).unsqueeze(1).unsqueeze(3)
        half = ids * self.inv_freq
        angles = torch.cat((half, half), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class TokenEmbedding(nn.Module):
    """Token ids to vectors; the weight is named ``weight``."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.vocab_size, shape.hidden_size))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Int64 [B, T] to float [B, T, H]."""
        return nn.functional.embedding(input_ids, self.weight)


class RmsNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), in float32 whatever comes in."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., H] to [..., H]."""
        wide = hidden.to(torch.float32)
        scale = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(hidden.dtype)


def rope_frequencies(theta: float, width: int) -> torch.Tensor:
    """Float32 [width / 2]: theta ** (-2i / width) (RoFormer, arXiv 2104.09864)."""
    # On the CPU whatever the default device: these are values, also of a model without weights.
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    return 1.0 / (theta**exponents)


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
        allowed: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        past: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        normal = self.input_layernorm(hidden)
        attended, key, value = self.self_attn(normal, size, allowed, rotation, past)
        hidden = hidden + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), key, value


class _Attention(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        width, bias = shape.num_heads * shape.head_dim, shape.attention_bias
        key_value_width = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(shape.hidden_size, key_value_width, bias=bias)
        self.v_proj = nn.Linear(shape.hidden_size, key_value_width, bias=bias)
        self.o_proj = nn.Linear(width, shape.hidden_size, bias=bias)

    def forward(
        self,
        hidden: torch.Tensor,
        size: tuple[int, int],
        allowed: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        past: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        shape = self.shape
        groups = shape.num_key_value_heads
        query = _rotate(self._heads(self.q_proj(hidden), size, shape.num_heads), rotation)
        key = _rotate(self._heads(self.k_proj(hidden), size, groups), rotation)
        value = self._heads(self.v_proj(hidden), size, groups)
        key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
        shared = shape.num_heads // groups
        scores = torch.matmul(query, _repeat(key, shared).transpose(2, 3)) * shape.head_dim**-0.5
        # The finite minimum, never -inf: a row that may see nothing (padding) stays a number.
        scores = torch.where(allowed, scores, torch.finfo(scores.dtype).min)
        # Cast first: softmax's own dtype argument is exported as a cast of its result.
        weights = torch.softmax(scores.to(torch.float32), dim=-1).to(query.dtype)
        mixed = torch.matmul(weights, _repeat(value, shared)).transpose(1, 2)
        merged = mixed.reshape(-1, shape.num_heads * shape.head_dim)
        return self.o_proj(merged), key, value

    def _heads(
        self, projected: torch.Tensor, size: tuple[int, int], num_heads: int
    ) -> torch.Tensor:
        """[B * S, heads * d] to [B, heads, S, d]."""
        return projected.reshape(*size, num_heads, self.shape.head_dim).transpose(1, 2)


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


def _allowed(attention_mask: torch.Tensor, *, num_queries: int, past: int) -> torch.Tensor:
    """Bool [B, 1, S, T]: not hidden, and not in the future. Causality goes by slot, not by id."""
    device = attention_mask.device
    key_slots = torch.arange(past + num_queries, device=device)
    query_slots = torch.arange(num_queries, device=device) + past
    causal = key_slots.unsqueeze(0) <= query_slots.unsqueeze(1)
    return causal & (attention_mask != 0).unsqueeze(1).unsqueeze(1)


def _rotate(heads: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    cos, sin = rotation
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    turned = torch.cat((-second, first), dim=-1)
    return heads * cos + turned * sin


def _repeat(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, key-value heads, T, d] to [B, heads, T, d]; query head h reads head h // groups."""
    if groups == 1:
        return heads
    batch, num_heads, length, width = heads.shape
    wide = heads.unsqueeze(2).expand(batch, num_heads, groups, length, width)
    return wide.reshape(batch, num_heads * groups, length, width)
