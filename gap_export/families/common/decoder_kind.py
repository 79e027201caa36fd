"""What a decoder is beside its sizes: the module, and what can be done with its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from gap_export.families.common.modules.decoder_stack import rope_constants
from gap_export.families.common.modules.llama_decoder import LlamaDecoder
from gap_export.spec.architecture import DecoderShape


@dataclass(frozen=True, kw_only=True)
class ChannelGroup:
    """Layers that read one input, and where it comes from: what AWQ scales together.

    Attributes:
        readers: Dotted names of linear layers, at least one.
        producer: Name of the norm or linear layer whose output, channel by channel, is the
            readers' input; or a factor of it.
        same_heads: Whether this holds only where every query head has a value head of its own.
    """

    readers: tuple[str, ...]
    producer: str
    same_heads: bool = False


@dataclass(frozen=True, kw_only=True)
class DecoderKind:
    """A kind of decoder; a family names one that is here, or brings its own.

    Attributes:
        module: Makes the decoder of a shape: (inputs_embeds, attention_mask, position_ids, *past)
            to (logits of the last position, *present), as :class:`LlamaDecoder` documents it. Its
            layers are a ``ModuleList`` called ``layers``, its head a linear layer ``lm_head``.
        constants: Values of its non-persistent buffers.
        channel_groups: What of a layer can be scaled, by names below the layer.
    """

    module: Callable[[DecoderShape], nn.Module]
    constants: Callable[[DecoderShape], Mapping[str, torch.Tensor]] = rope_constants
    channel_groups: tuple[ChannelGroup, ...] = ()


LLAMA = DecoderKind(
    module=LlamaDecoder,
    channel_groups=(
        ChannelGroup(
            readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            producer="input_layernorm",
        ),
        ChannelGroup(readers=("self_attn.o_proj",), producer="self_attn.v_proj", same_heads=True),
        ChannelGroup(readers=("mlp.gate_proj", "mlp.up_proj"), producer="post_attention_layernorm"),
        ChannelGroup(readers=("mlp.down_proj",), producer="mlp.up_proj"),
    ),
)
