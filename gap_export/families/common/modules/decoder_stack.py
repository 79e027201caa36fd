"""What all decoders have in common: a stack of layers with explicit position ids and KV cache.

Between attention's own steps the hidden state is a matrix, [B * S, H]: a linear layer on a matrix
is one ONNX Gemm that reads its weight as the checkpoint stores it. On three dimensions it would be
a MatMul by a transposed weight, and runtimes keep the transposed copy of every weight in memory.

Shape letters: B rows, S fed tokens, T = past + S slots, H hidden, V vocabulary, d head width,
A axes of a position.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gap_export.families.common.modules.attention import (
    key_bias,
    rope_frequencies,
    rope_rotation,
)
from gap_export.spec.architecture import DecoderShape


class DecoderStack(nn.Module):
    """Layers, final norm and LM head.

    Args:
        shape: What the decoder is made of.
        layers: Each takes the hidden state [B * S, H], the size (B, S), float32 [B, 1, S, T] that
            blocks keys (:func:`key_bias`), a rotation, and its past keys and values; it gives the
            hidden state, keys and values.
        norm: Before the head.

    Attributes:
        proportional_attention: Whether ``attention_mask`` says as how many tokens a slot counts;
            see :func:`key_bias`.
    """

    inv_freq: torch.Tensor
    rope_axes: torch.Tensor

    def __init__(
        self, shape: DecoderShape, *, layers: Sequence[nn.Module], norm: nn.Module
    ) -> None:
        super().__init__()
        self.shape = shape
        self.proportional_attention = False
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.lm_head = nn.Linear(shape.hidden_size, shape.vocab_size, bias=False)
        # Not in any checkpoint: their values are rope_constants.
        for name, value in rope_constants(shape).items():
            empty = torch.empty(value.shape, dtype=value.dtype)
            self.register_buffer(name, empty, persistent=False)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past_key_values: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """One step: prefill (past of length 0) or decode.

        Args:
            inputs_embeds: float [B, S, (1 + taps) * H]: the hidden state, then a plane a tap.
            attention_mask: int64 [B, T], over cache slots; 0 hides a slot from every query. Zeros
                may lie anywhere. What is above 0 is 1, or with proportional attention the number of
                tokens that the slot counts as.
            position_ids: int64 [B, S], what RoPE sees; [A, B, S] where positions have axes.
            *past_key_values: key and value of each layer in turn, float
                [B, key-value heads, past, d].

        Returns:
            logits [B, 1, V] of the last position, then key and value of each layer,
            [B, key-value heads, T, d].
        """
        past_length = past_key_values[0].shape[2]
        bias = key_bias(
            attention_mask,
            num_queries=inputs_embeds.shape[1],
            past=past_length,
            proportional=self.proportional_attention,
        )
        axes = self.rope_axes if self.shape.position_axes > 1 else None
        rotation = rope_rotation(position_ids, self.inv_freq, inputs_embeds.dtype, axes)
        batch, length, width = inputs_embeds.shape
        hidden = inputs_embeds.reshape(-1, width)
        taps: Sequence[torch.Tensor] = ()
        if self.shape.num_taps:
            # [B * S, (1 + taps) * H] to so many matrices [B * S, H].
            width = self.shape.hidden_size
            hidden, *taps = torch.chunk(hidden, 1 + self.shape.num_taps, dim=1)
        present: list[torch.Tensor] = []
        for index, layer in enumerate(self.layers):
            past = past_key_values[2 * index], past_key_values[2 * index + 1]
            hidden, key, value = layer(hidden, (batch, length), bias, rotation, past)
            present += [key, value]
            if index < len(taps):
                hidden = hidden + taps[index]
        last = hidden.reshape(batch, length, width)[:, -1]
        logits = self.lm_head(self.norm(last)).unsqueeze(1)
        return (logits, *present)


def rope_constants(shape: DecoderShape) -> dict[str, torch.Tensor]:
    """Buffers that RoPE reads, by name: frequencies, and their axes where there are several."""
    found = {"inv_freq": rope_frequencies(shape.rope_theta, 2 * shape.num_frequencies)}
    if shape.position_axes > 1:
        found["rope_axes"] = torch.tensor(shape.frequency_axes(), device="cpu")
    return found


class TokenEmbedding(nn.Module):
    """Token ids to vectors; the weight is named ``weight``."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape.vocab_size, shape.hidden_size))
        self.extra = shape.embeds_size - shape.hidden_size

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Int64 [B, T] to float [B, T, (1 + taps) * H]; what taps add to words is nothing."""
        words = nn.functional.embedding(input_ids, self.weight)
        return nn.functional.pad(words, (0, self.extra)) if self.extra else words
