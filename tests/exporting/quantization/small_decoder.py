"""Decoders with weights that were drawn, and prompts for them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from gap_export.checkpoint.weights import DerivedWeight
from gap_export.families import Component
from gap_export.families.common.components import decoder_component
from gap_export.families.common.decoder_kind import LLAMA
from gap_export.families.common.modules.expected import decoder_key
from gap_export.families.common.modules.llama_decoder import LlamaDecoder
from gap_export.spec.architecture import DecoderShape

HIDDEN, INNER, LAYERS = 64, 128, 2


def build_decoder(*, key_value_heads: int = 4, bias: bool = False, loud: float = 1.0) -> Component:
    """Two layers, four heads of 16; ``loud``: how much larger every eighth channel of a norm is."""
    shape = DecoderShape(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_layers=LAYERS,
        num_heads=4,
        num_key_value_heads=key_value_heads,
        head_dim=16,
        vocab_size=50,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        attention_bias=bias,
        mlp_bias=bias,
    )
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        module = LlamaDecoder(shape)
    weights = {}
    for key, parameter in module.state_dict().items():
        noise = torch.randn(tuple(parameter.shape), generator=generator)
        if "norm" in key:
            values = 1.0 + 0.1 * noise
            if "layernorm" in key:
                values[::8] *= loud
        else:
            values = noise * (0.1 if parameter.ndim == 1 else parameter.shape[1] ** -0.5)
        weights[decoder_key(key)] = DerivedWeight(
            dtype="F32",
            shape=tuple(values.shape),
            sources=(),
            compute=lambda values=values: values,
            origin=key,
        )
    source: Any = SimpleNamespace(architecture=SimpleNamespace(decoder=shape), weights=weights)
    with torch.device("meta"):
        return decoder_component(source, LLAMA, dtype="float32")


def draw_prompts(*, key_value_heads: int = 4, seed: int = 0) -> list[tuple[torch.Tensor, ...]]:
    """Four batches of two prompts, the shorter padded on the left, for :func:`build_decoder`."""
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for _ in range(4):
        embeds = torch.randn(2, 12, HIDDEN, generator=generator)
        mask = torch.ones(2, 12, dtype=torch.int64)
        mask[1, :3] = 0
        slots = (mask.cumsum(dim=1) - 1).clamp(min=0)
        empty = torch.zeros(2, key_value_heads, 0, 16)
        drawn.append((embeds, mask, slots, *([empty] * (2 * LAYERS))))
    return drawn
