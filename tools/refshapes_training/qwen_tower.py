"""Qwen3-VL's vision tower: no [CLS], positions by rotation in attention alone.

It has no learned positions, though Qwen3-VL has a table of them beside the rotation: where a token
lies is then in its position ids alone, and what wrong ones do can be seen.

Shape letters: B images, P patches in raster order, J patches to a token, N = P / J tokens, C width
of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    Qwen3VLVisionBlock,
    Qwen3VLVisionRotaryEmbedding,
    apply_rotary_pos_emb_vision,
)

from gap_export.families.common.modules.joining import join_patches
from refshapes_training.designs import Design
from refshapes_training.towers import (
    VISION_HEADS,
    VISION_INNER_WIDTH,
    VISION_LAYERS,
    VISION_WIDTH,
    normal_by_fan_in,
    normalise_pixels,
)


class QwenTower(nn.Module):
    """The tower; its blocks' weights are named as in Qwen3-VL's checkpoints.

    Attributes:
        design: The design of the model.
        config: Sizes, in transformers' terms.
        num_layers_read: Layers that the decoder's features need.
    """

    num_layers_read = VISION_LAYERS

    def __init__(self, design: Design) -> None:
        """Build with random weights drawn from torch's global generator."""
        super().__init__()
        self.design = design
        self.config = qwen_vision_config(design)
        patch = design.patch_size
        self.patch_embedding = nn.Conv2d(3, VISION_WIDTH, patch, stride=patch)
        self.blocks = nn.ModuleList([Qwen3VLVisionBlock(self.config) for _ in range(VISION_LAYERS)])
        # In training alone: what is compared with texts is normalized.
        self.post_layernorm = nn.LayerNorm(VISION_WIDTH, eps=1e-5)
        rows, cols = design.patch_grid
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(cols))
        cos, sin = Qwen3VLVisionRotaryEmbedding(self.config)(places, places)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        with torch.no_grad():
            normal_by_fan_in(self.blocks, 0.6)
            self.patch_embedding.weight.normal_(0, (3 * patch**2) ** -0.5)

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return self.blocks

    def forward(
        self,
        images: Tensor,
        *,
        roll: bool = False,  # noqa: ARG002
        num_layers: int | None = None,
    ) -> list[Tensor]:
        """Hidden states, embeddings first.

        Args:
            images: uint8 [B, height, width, 3].
            roll: There is no table to shift.
            num_layers: Stop after this many layers; all when None.

        Returns:
            One [B, P, C] tensor per computed state.
        """
        pixels = normalise_pixels(images, self.design.tower)
        hidden = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        states = [hidden]
        for block in self.blocks[:num_layers]:
            hidden = hidden + self._attend(block.attn, block.norm1(hidden))
            hidden = hidden + block.mlp(block.norm2(hidden))
            states.append(hidden)
        return states

    def _attend(self, attention: nn.Module, hidden: Tensor) -> Tensor:
        """Of all images at once, which transformers' own code takes one by one."""
        heads = attention.qkv(hidden).unflatten(2, (3, VISION_HEADS, -1))
        query, key, value = heads.unbind(2)
        query, key = apply_rotary_pos_emb_vision(query, key, self.cos, self.sin)
        seen = functional.scaled_dot_product_attention(
            *(part.transpose(1, 2) for part in (query, key, value))
        )
        return attention.proj(seen.transpose(1, 2).flatten(2))

    def selected(self, states: list[Tensor]) -> Tensor:
        """What is read of each patch; [B, P, C]."""
        return states[-1]

    def tokens(self, selected: Tensor) -> Tensor:
        """The patches of a token side by side; [B, N, J * C]."""
        return join_patches(selected, self.design.patch_grid, self.design.join).flatten(2)

    def tapped(self, states: list[Tensor]) -> list[Tensor]:
        """States of earlier blocks that are handed on."""
        return [states[1 + block] for block in self.design.taps]

    def comparable(self, selected: Tensor) -> Tensor:
        """Selected patches as the projection into the joint space takes them; [B, P, C]."""
        return self.post_layernorm(selected)

    def whole(self, states: list[Tensor]) -> Tensor:
        """What speaks for the image, the mean of its patches; [B, C]."""
        return self.post_layernorm(states[-1]).mean(1)


def qwen_vision_config(design: Design, *, out_hidden_size: int = 0) -> Qwen3VLVisionConfig:
    """Sizes of the tower and of the mergers behind it."""
    return Qwen3VLVisionConfig(
        depth=VISION_LAYERS,
        hidden_size=VISION_WIDTH,
        intermediate_size=VISION_INNER_WIDTH,
        num_heads=VISION_HEADS,
        patch_size=design.patch_size,
        spatial_merge_size=design.join[0],
        temporal_patch_size=2,
        out_hidden_size=out_hidden_size,
        num_position_embeddings=16,
        deepstack_visual_indexes=list(design.taps),
        attn_implementation="sdpa",
    )
