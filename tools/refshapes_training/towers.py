"""Vision towers of the demo models: CLIP's, and EVA's as MiniGPT-v2 uses it.

Shape letters: B images, G patches along a side, P = G * G patches, J patches to a token, N = P / J
tokens, C width of a patch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import CLIPVisionConfig
from transformers.models.clip.modeling_clip import CLIPEncoder

from gap_export.evaluation.refshapes import IMAGE_SIZE
from refshapes_training.designs import Design

VISION_WIDTH = 128
VISION_INNER_WIDTH = 384
VISION_LAYERS = 4
VISION_HEADS = 4
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
_ACTIVATIONS = {"clip": "quick_gelu", "eva": "gelu"}
_LAYER_NORM_EPS = {"clip": 1e-5, "eva": 1e-6}


class VisionTower(nn.Module):
    """The tower, its weights named as in CLIP's `vision_model`.

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
        # CLIP's own spelling; EVA has no such norm.
        self.pre_layrnorm = nn.LayerNorm(VISION_WIDTH, eps=eps)
        if design.tower == "eva":
            self.pre_layrnorm = nn.Identity()
        self.encoder = CLIPEncoder(self.config)
        self.post_layernorm = nn.LayerNorm(VISION_WIDTH, eps=1e-5)
        self._initialise()

    def forward(
        self, images: Tensor, *, roll: bool = False, num_layers: int | None = None
    ) -> list[Tensor]:
        """Hidden states, embeddings first.

        Args:
            images: uint8 [B, 96, 96, 3].
            roll: Shift the position table cyclically by a random offset per image. The tower can
                then learn relative places only, and the decoder must take absolute ones from RoPE.
            num_layers: Stop after this many layers; all when None.

        Returns:
            One [B, 1 + P, C] tensor per computed state.
        """
        embeddings = self.embeddings
        patches = embeddings.patch_embedding(normalise_pixels(images)).flatten(2).transpose(1, 2)
        table = embeddings.position_embedding.weight
        batch = images.shape[0]
        if roll:
            shifted = _rolled_indices(batch, self.design.patch_side, images.device)
            positions = functional.embedding(shifted, table[1:])
        else:
            positions = table[1:].expand(batch, -1, -1)
        cls = (embeddings.class_embedding + table[0]).expand(batch, 1, -1)
        hidden = self.pre_layrnorm(torch.cat([cls, patches + positions], 1))
        states = [hidden]
        for layer in self.encoder.layers[:num_layers]:
            hidden = layer(hidden, None)
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
        return self.post_layernorm(hidden) if self.design.tower == "eva" else hidden

    def tokens(self, selected: Tensor) -> Tensor:
        """Patches that follow each other in a row, side by side; [B, N, J * C]."""
        batch, patches, width = selected.shape
        return selected.reshape(batch, patches // self.design.join, self.design.join * width)

    def comparable(self, selected: Tensor) -> Tensor:
        """Selected patches as the projection into the joint space takes them; [B, P, C]."""
        return selected if self.design.tower == "eva" else self.post_layernorm(selected)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Scale matrices by fan-in: the libraries' 0.02 is meant for widths of thousands."""
        normal_by_fan_in(self.encoder.layers, 0.6)
        patch, side = self.design.patch_size, self.design.patch_side
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
        patch, eva = design.patch_size, design.tower == "eva"
        self.class_embedding = nn.Parameter(torch.randn(VISION_WIDTH) * VISION_WIDTH**-0.5)
        self.patch_embedding = nn.Conv2d(3, VISION_WIDTH, patch, stride=patch, bias=eva)
        self.position_embedding = nn.Embedding(design.patch_side**2 + 1, VISION_WIDTH)
        nn.init.normal_(self.position_embedding.weight, std=0.02)


def vision_config(design: Design) -> CLIPVisionConfig:
    """Sizes of a tower."""
    return CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=VISION_INNER_WIDTH,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=VISION_HEADS,
        image_size=IMAGE_SIZE,
        patch_size=design.patch_size,
        projection_dim=64,
        hidden_act=_ACTIVATIONS[design.tower],
        layer_norm_eps=_LAYER_NORM_EPS[design.tower],
        attn_implementation="sdpa",
    )


def normalise_pixels(images: Tensor) -> Tensor:
    """CLIP's normalisation; uint8 [B, 96, 96, 3] -> float32 [B, 3, 96, 96]."""
    mean = torch.tensor(PIXEL_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(PIXEL_STD, device=images.device).view(1, 3, 1, 1)
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


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
