"""Vision towers with [CLS]: CLIP's, EVA's as MiniGPT-v2 uses it, and InternViT on tiles.

Shape letters: B images, W views of an image (tiles, or 1), G patches along a side of a view,
P = W * G * G patches, J patches to a token, N = P / J tokens, C width of a patch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig, InternVLVisionConfig, PretrainedConfig
from transformers.models.clip.modeling_clip import CLIPEncoder
from transformers.models.internvl.modeling_internvl import InternVLVisionEncoder

from gap_export.families.common.modules.joining import join_patches
from refshapes_training.designs import Design, Tower

VISION_WIDTH = 128
VISION_INNER_WIDTH = 384
VISION_LAYERS = 4
VISION_HEADS = 4
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PIXEL_STATISTICS: Mapping[Tower, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "clip": (_CLIP_MEAN, _CLIP_STD),
    "eva": (_CLIP_MEAN, _CLIP_STD),
    "qwen3_vl": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "internvl": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
_ACTIVATIONS = {"clip": "quick_gelu", "eva": "gelu"}
_LAYER_NORM_EPS = {"clip": 1e-5, "eva": 1e-6}


class VisionTower(nn.Module):
    """The tower, its weights named as in CLIP's `vision_model`; InternViT's layers as in its own.

    Attributes:
        design: The design of the model.
        config: Sizes, in transformers' terms.
    """

    def __init__(self, design: Design) -> None:
        """Build with random weights drawn from torch's global generator."""
        super().__init__()
        self.design = design
        self.config = vision_config(design)
        eps = self.config.layer_norm_eps
        self.embeddings = _Embeddings(design)
        # CLIP's own spelling; the others have no such norm.
        self.pre_layrnorm = nn.LayerNorm(VISION_WIDTH, eps=eps)
        if design.tower != "clip":
            self.pre_layrnorm = nn.Identity()
        intern = design.tower == "internvl"
        self.encoder = (InternVLVisionEncoder if intern else CLIPEncoder)(self.config)
        # InternViT has none: what is compared with texts in training is normalized all the same.
        self.post_layernorm = nn.LayerNorm(VISION_WIDTH, eps=1e-5)
        self._initialise()

    @property
    def layers(self) -> nn.ModuleList:
        """The encoder's layers."""
        encoder = self.encoder
        return encoder.layer if isinstance(encoder, InternVLVisionEncoder) else encoder.layers

    def forward(
        self, images: Tensor, *, roll: bool = False, num_layers: int | None = None
    ) -> list[Tensor]:
        """Hidden states, embeddings first.

        Args:
            images: uint8 [B, height, width, 3], or [B, W, side, side, 3].
            roll: Shift the position table cyclically by a random offset per view. The tower can
                then learn relative places only, and the decoder must take absolute ones from RoPE.
            num_layers: Stop after this many layers; all when None.

        Returns:
            One [B * W, 1 + G * G, C] tensor per computed state.
        """
        embeddings = self.embeddings
        pixels = normalise_pixels(images, self.design.tower)
        patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        table = embeddings.position_embedding.weight
        batch = patches.shape[0]
        if roll:
            shifted = _rolled_indices(batch, self.design.patch_grid[0], images.device)
            positions = functional.embedding(shifted, table[1:])
        else:
            positions = table[1:].expand(batch, -1, -1)
        cls = (embeddings.class_embedding + table[0]).expand(batch, 1, -1)
        hidden = self.pre_layrnorm(torch.cat([cls, patches + positions], 1))
        states = [hidden]
        for layer in self.layers[:num_layers]:
            hidden = layer(hidden) if self.design.tower == "internvl" else layer(hidden, None)
            states.append(hidden)
        return states

    @property
    def num_layers_read(self) -> int:
        """Layers that the decoder's features need."""
        return VISION_LAYERS - (self.design.tower == "clip")

    def selected(self, states: list[Tensor]) -> Tensor:
        """What the family reads of each patch; [B, P, C].

        Args:
            states: From :meth:`forward`, at least up to `num_layers_read`.
        """
        hidden = states[self.num_layers_read][:, 1:]
        hidden = hidden.reshape(-1, len(self.design.patches.order), VISION_WIDTH)
        return self.post_layernorm(hidden) if self.design.tower == "eva" else hidden

    def tokens(self, selected: Tensor) -> Tensor:
        """The patches of a token side by side; [B, N, J * C]."""
        rows, cols = grid = self.design.patch_grid
        views = selected.reshape(-1, rows * cols, VISION_WIDTH)
        joined = join_patches(views, grid, self.design.join)
        return joined.reshape(selected.shape[0], self.design.num_tokens, -1)

    def tapped(self, states: list[Tensor]) -> list[Tensor]:
        """States of earlier layers that are handed on: none."""
        del states
        return []

    def comparable(self, selected: Tensor) -> Tensor:
        """Selected patches as the projection into the joint space takes them; [B, P, C]."""
        return selected if self.design.tower == "eva" else self.post_layernorm(selected)

    def whole(self, states: list[Tensor]) -> Tensor:
        """What speaks for the image, [CLS] of its last view; [B, C]."""
        views = len(self.design.patches.order) // (states[-1].shape[1] - 1)
        return self.post_layernorm(states[-1][views - 1 :: views, 0])

    @torch.no_grad()
    def _initialise(self) -> None:
        """Scale matrices by fan-in: the libraries' 0.02 is meant for widths of thousands."""
        normal_by_fan_in(self.layers, 0.6)
        for name, scale in self.layers.named_parameters():
            if "lambda_" in name:
                scale.fill_(1.0)
        patch, side = self.design.patch_size, self.design.patch_grid[0]
        self.embeddings.patch_embedding.weight.normal_(0, (3 * patch**2) ** -0.5)
        # Sines whose periods divide the side: shifting such a table cyclically is a rotation.
        angle = torch.arange(side) * 2 * math.pi / side
        waves = torch.stack([f(k * angle) for k in (1, 2, 3, 4) for f in (torch.sin, torch.cos)], 1)
        rows = waves[:, None].expand(side, side, -1)
        columns = waves[None].expand(side, side, -1)
        table = torch.cat([rows, columns], -1).flatten(0, 1)
        mixing = torch.randn(table.shape[1], VISION_WIDTH) * table.shape[1] ** -0.5
        self.embeddings.position_embedding.weight[1:] = 0.7 * table @ mixing


class _Embeddings(nn.Module):
    def __init__(self, design: Design) -> None:
        super().__init__()
        patch, biased = design.patch_size, design.tower != "clip"
        self.class_embedding = nn.Parameter(torch.randn(VISION_WIDTH) * VISION_WIDTH**-0.5)
        self.patch_embedding = nn.Conv2d(3, VISION_WIDTH, patch, stride=patch, bias=biased)
        rows, cols = design.patch_grid
        self.position_embedding = nn.Embedding(rows * cols + 1, VISION_WIDTH)
        nn.init.normal_(self.position_embedding.weight, std=0.02)


def vision_config(design: Design) -> PretrainedConfig:
    """Sizes of a tower."""
    rows, cols = design.patch_grid
    sizes = {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": VISION_INNER_WIDTH,
        "num_hidden_layers": VISION_LAYERS,
        "num_attention_heads": VISION_HEADS,
        "attn_implementation": "sdpa",
    }
    if design.tower == "internvl":
        return InternVLVisionConfig(
            **sizes,
            attention_bias=True,
            image_size=(rows * design.patch_size, cols * design.patch_size),
            patch_size=(design.patch_size, design.patch_size),
        )
    return CLIPVisionConfig(
        **sizes,
        image_size=rows * design.patch_size,
        patch_size=design.patch_size,
        projection_dim=64,
        hidden_act=_ACTIVATIONS[design.tower],
        layer_norm_eps=_LAYER_NORM_EPS[design.tower],
    )


def normalise_pixels(images: Tensor, tower: Tower) -> Tensor:
    """Normalisation of a tower; uint8 [..., h, w, 3] to float32 [n, 3, h, w]."""
    mean, std = (torch.tensor(part, device=images.device) for part in PIXEL_STATISTICS[tower])
    normal = (images.flatten(0, -4).float() / 255 - mean) / std
    return normal.permute(0, 3, 1, 2)


def normal_by_fan_in(module: nn.Module, gain: float) -> None:
    """Redraw the matrices of `module` with standard deviation gain / sqrt(fan-in)."""
    for parameter in module.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, gain * parameter.shape[1] ** -0.5)


def _rolled_indices(batch: int, side: int, device: torch.device) -> Tensor:
    """Row-major table indices shifted cyclically by a random (dx, dy) per image; [B, P]."""
    grid = torch.arange(side, device=device)
    shift = torch.randint(0, side, (2, batch, 1), device=device)
    rows, columns = ((grid[None] + shift) % side).unbind(0)
    return (rows[:, :, None] * side + columns[:, None, :]).flatten(1)
