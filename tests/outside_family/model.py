"""What the family computes: SigLIP's tower without CLS, and Phi's decoder.

Phi differs from Llama where a decoder can: LayerNorms with a bias, attention and MLP side by side
behind one of them, half of each head turned by RoPE, a GELU in place of a gate, and biases.

Shape letters: I images, N patches, D vision features, B rows, S fed tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import ACT2FN

from gap_export.families.common.decoder_kind import ChannelGroup, DecoderKind
from gap_export.families.common.modules.attention import Rotation, attend, rotate, split_heads
from gap_export.families.common.modules.clip_layers import ClipEncoder
from gap_export.families.common.modules.decoder_stack import DecoderStack
from gap_export.families.common.modules.pruned_vision import VisionFeatures
from gap_export.spec.architecture import Architecture, DecoderShape, VisionShape


class SiglipTower(nn.Module):
    """SigLIP's first layers, which are CLIP's; in front of them neither CLS nor a norm."""

    def __init__(self, shape: VisionShape, *, num_layers: int) -> None:
        super().__init__()
        self.embeddings = _Patches(shape)
        self.encoder = ClipEncoder(shape, num_layers=num_layers)

    def forward(self, pixel_values: torch.Tensor) -> VisionFeatures:
        """Float [I, 3, h, w] to patches and keys; what CLS would give stays None."""
        hidden, attended = self.encoder(self.embeddings(pixel_values))
        return VisionFeatures(patches=hidden, keys=attended.keys.mean(dim=1))


class _Patches(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        patch = shape.patch_size
        self.patch_embedding = nn.Conv2d(3, shape.width, kernel_size=patch, stride=patch)
        self.position_embedding = nn.Embedding(shape.num_patches, shape.width)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return patches + self.position_embedding.weight


class PhiLayer(nn.Module):
    """Weight names are those of transformers' ``PhiDecoderLayer``."""

    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.self_attn = _Attention(shape)
        self.mlp = _Mlp(shape)
        self.input_layernorm = nn.LayerNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def forward(
        self,
        hidden: torch.Tensor,
        size: tuple[int, int],
        bias: torch.Tensor,
        rotation: Rotation,
        past: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See :class:`DecoderStack`."""
        normal = self.input_layernorm(hidden)
        attended, key, value = self.self_attn(normal, size, bias, rotation, past)
        return hidden + attended + self.mlp(normal), key, value


class _Attention(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.shape = shape
        width = shape.num_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, width)
        self.k_proj = nn.Linear(shape.hidden_size, width)
        self.v_proj = nn.Linear(shape.hidden_size, width)
        self.dense = nn.Linear(width, shape.hidden_size)

    def forward(self, normal, size, bias, rotation, past):
        shape = self.shape
        query, key, value = (
            split_heads(linear(normal), size, shape.num_heads, shape.head_dim)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        turned = (rotate(part, rotation, shape.rotary_dim) for part in (query, key))
        merged, key, value = attend(*turned, value, past, bias, shape)
        return self.dense(merged), key, value


class _Mlp(nn.Module):
    def __init__(self, shape: DecoderShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.fc2 = nn.Linear(shape.intermediate_size, shape.hidden_size)
        self.activation_fn = ACT2FN[shape.activation]

    def forward(self, normal: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation_fn(self.fc1(normal)))


def make_decoder(shape: DecoderShape) -> DecoderStack:
    """Phi's decoder."""
    return DecoderStack(
        shape,
        layers=[PhiLayer(shape) for _ in range(shape.num_layers)],
        norm=nn.LayerNorm(shape.hidden_size, eps=shape.rms_norm_eps),
    )


def make_tower(architecture: Architecture, num_layers: int) -> SiglipTower:
    """The tower as far as the select layer."""
    return SiglipTower(architecture.vision, num_layers=num_layers)


PHI = DecoderKind(
    module=make_decoder,
    # What AWQ scales together. The one norm feeds attention and MLP; behind fc1 is a GELU, through
    # which no scale can be moved, so that fc2 is rounded as it is.
    channel_groups=(
        ChannelGroup(
            readers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"),
            producer="input_layernorm",
        ),
        ChannelGroup(readers=("self_attn.dense",), producer="self_attn.v_proj"),
    ),
)
