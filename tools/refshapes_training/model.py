"""The networks: a genuine LLaVA, a CLIP text tower beside it, and training-only heads.

Shape letters: B images, N=144 patches, C vision width, H decoder width, S sequence, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from gap_export.evaluation.refshapes import COLORS, GRID_SIZE, IMAGE_SIZE, PATCH_SIZE, SHAPES
from refshapes_training import vocabulary as vocab

NUM_PATCHES = GRID_SIZE * GRID_SIZE
VISION_WIDTH = 128
DECODER_WIDTH = 160
DECODER_HEADS = 5
PROJECTION_WIDTH = 64
SELECT_LAYER = -2
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
POINTER_LAYERS = (1, 2)
PREFIX_LENGTH = len(vocab.PREFIX) + NUM_PATCHES


class RefShapesModel(nn.Module):
    """LLaVA plus the part of CLIP that it lacks; all that ends up in the checkpoint."""

    def __init__(self) -> None:
        """Build with random weights drawn from torch's global generator."""
        super().__init__()
        self.llava = LlavaForConditionalGeneration(_llava_config())
        self.text = CLIPTextModelWithProjection(_text_config())
        self.visual_projection = nn.Linear(VISION_WIDTH, PROJECTION_WIDTH, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))
        self.patch_text_scale = nn.Parameter(torch.tensor(2.3))
        self.patch_text_bias = nn.Parameter(torch.tensor(-4.0))
        _initialise(self)

    @property
    def vision_tower(self) -> nn.Module:
        """The CLIP vision transformer."""
        return self.llava.model.vision_tower

    @property
    def projector(self) -> nn.Module:
        """The two-layer MLP between the vision tower and the decoder."""
        return self.llava.model.multi_modal_projector

    @property
    def decoder(self) -> nn.Module:
        """The Llama decoder without its head."""
        return self.llava.model.language_model

    def encode_image(
        self, images: Tensor, *, roll: bool = False, num_layers: int | None = None
    ) -> list[Tensor]:
        """Hidden states of the vision tower, embeddings first.

        Args:
            images: uint8 [B, 96, 96, 3].
            roll: Shift the position table cyclically by a random offset per image. The tower can
                then learn relative places only, and the decoder must take absolute ones from RoPE.
            num_layers: Stop after this many layers; all when None.

        Returns:
            One [B, 1+N, C] tensor per computed state.
        """
        embeddings = self.vision_tower.embeddings
        patches = embeddings.patch_embedding(normalise_pixels(images)).flatten(2).transpose(1, 2)
        table = embeddings.position_embedding.weight
        batch = images.shape[0]
        if roll:
            positions = functional.embedding(_rolled_indices(batch, images.device), table[1:])
        else:
            positions = table[1:].expand(batch, -1, -1)
        cls = (embeddings.class_embedding + table[0]).expand(batch, 1, -1)
        hidden = self.vision_tower.pre_layrnorm(torch.cat([cls, patches + positions], 1))
        states = [hidden]
        for layer in self.vision_tower.encoder.layers[:num_layers]:
            hidden = layer(hidden, None)
            states.append(hidden)
        return states

    def project_patches(self, selected: Tensor) -> Tensor:
        """Patch features in CLIP's joint space; [..., C] -> [..., 64], not normalised."""
        return self.visual_projection(self.vision_tower.post_layernorm(selected))

    def encode_text(self, ids: Tensor) -> Tensor:
        """Text embeddings of `<s> words </s>`; int64 [B, T] -> [B, 64], not normalised."""
        return self.text(input_ids=ids).text_embeds

    def decode(
        self, embeds: Tensor, position_ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the decoder with explicit ids and mask, without a cache.

        Args:
            embeds: [B, S, H].
            position_ids: int64 [B, S].
            mask: bool [B or 1, 1, S, S], True where a query may look.

        Returns:
            The normalised last state [B, S, H], and the state after every layer.
        """
        rotary = self.decoder.rotary_emb(embeds, position_ids)
        hidden, states = embeds, []
        for layer in self.decoder.layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=position_ids,
                position_embeddings=rotary,
                use_cache=False,
            )
            states.append(hidden)
        return self.decoder.norm(hidden), states

    def attention(self, inputs: list[Tensor], position_ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Attention weights of every layer, which the fused kernels do not give.

        Args:
            inputs: The state that enters each layer, [B, S, H].
            position_ids: int64 [B, S].
            mask: bool [B, 1, S, S], True where a query may look.

        Returns:
            For each layer float32 [B, heads, S, S]; rows sum to 1.
        """
        cos, sin = self.decoder.rotary_emb(inputs[0], position_ids)
        weights = []
        for layer, hidden in zip(self.decoder.layers, inputs, strict=True):
            normed, attention = layer.input_layernorm(hidden), layer.self_attn
            shape = (*normed.shape[:2], -1, attention.head_dim)
            query = attention.q_proj(normed).view(shape).transpose(1, 2)
            key = attention.k_proj(normed).view(shape).transpose(1, 2)
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            scores = (query @ key.transpose(2, 3)).float() * attention.scaling
            hidden_away = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
            weights.append(hidden_away.softmax(-1))
        return weights


class VisionHeads(nn.Module):
    """Training-only: what a patch shows, read from the selected vision layer."""

    def __init__(self) -> None:
        """Build with random weights."""
        super().__init__()
        self.outputs = (len(COLORS) + 1, len(SHAPES) + 1, 4)
        self.linear = nn.Linear(VISION_WIDTH, sum(self.outputs))

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Colour logits, shape logits and box offsets; [B, N, 9], [B, N, 7], [B, N, 4]."""
        color, shape, offsets = self.linear(patches).float().split(self.outputs, -1)
        return color, shape, offsets


class LanguageHeads(nn.Module):
    """Training-only: place probes, pointers at the target, and alignment with word embeddings."""

    def __init__(self) -> None:
        """Build with random weights."""
        super().__init__()
        self.outputs = (GRID_SIZE, GRID_SIZE, 4)
        self.place = nn.Linear(DECODER_WIDTH, sum(self.outputs))
        self.queries = nn.ModuleList(nn.Linear(DECODER_WIDTH, 64) for _ in POINTER_LAYERS)
        self.keys = nn.ModuleList(nn.Linear(DECODER_WIDTH, 64) for _ in POINTER_LAYERS)
        self.alignment_scale = nn.Parameter(torch.tensor(math.log(8.0)))

    def places(self, visual: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Row logits, column logits and boxes of visual states [B, N, H]."""
        rows, columns, boxes = self.place(visual).float().split(self.outputs, -1)
        return rows, columns, boxes

    def pointer_logits(self, which: int, asking: Tensor, visual: Tensor, row: Tensor) -> Tensor:
        """How strongly each question points at each patch.

        Args:
            which: Index into `POINTER_LAYERS`.
            asking: States of `ASSISTANT:` [Q, H].
            visual: Visual states [B, N, H].
            row: int64 [Q], the image each question belongs to.

        Returns:
            float32 [Q, N].
        """
        queries = self.queries[which](asking).float()
        keys = self.keys[which](visual).float()
        return torch.einsum("qd,qnd->qn", queries, keys[row]) / 8.0


def normalise_pixels(images: Tensor) -> Tensor:
    """CLIP's normalisation; uint8 [B, 96, 96, 3] -> float32 [B, 3, 96, 96]."""
    mean = torch.tensor(PIXEL_MEAN, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(PIXEL_STD, device=images.device).view(1, 3, 1, 1)
    return (images.permute(0, 3, 1, 2).float() / 255 - mean) / std


def _rolled_indices(batch: int, device: torch.device) -> Tensor:
    """Row-major table indices shifted cyclically by a random (dx, dy) per image; [B, N]."""
    grid = torch.arange(GRID_SIZE, device=device)
    shift = torch.randint(0, GRID_SIZE, (2, batch, 1), device=device)
    rows, columns = ((grid[None] + shift) % GRID_SIZE).unbind(0)
    return (rows[:, :, None] * GRID_SIZE + columns[:, None, :]).flatten(1)


def _llava_config() -> LlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=PROJECTION_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(vocab.TOKENS),
        hidden_size=DECODER_WIDTH,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=DECODER_HEADS,
        num_key_value_heads=DECODER_HEADS,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=vocab.BOS,
        eos_token_id=vocab.EOS,
        pad_token_id=vocab.PAD,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=vocab.IMAGE,
        projector_hidden_act="gelu",
        vision_feature_layer=SELECT_LAYER,
        vision_feature_select_strategy="default",
        image_seq_length=NUM_PATCHES,
        tie_word_embeddings=False,
    )


def _text_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(vocab.TOKENS),
        hidden_size=VISION_WIDTH,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=vocab.MAX_TEXT_TOKENS,
        projection_dim=PROJECTION_WIDTH,
        bos_token_id=vocab.BOS,
        eos_token_id=vocab.EOS,
        pad_token_id=vocab.PAD,
    )


@torch.no_grad()
def _initialise(model: RefShapesModel) -> None:
    """Scale matrices by fan-in: the libraries' 0.02 is meant for widths of thousands."""
    _normal_by_fan_in(model.decoder.layers, 0.7)
    _normal_by_fan_in(model.projector, 1.0)
    _normal_by_fan_in(model.vision_tower.encoder.layers, 0.6)
    model.decoder.embed_tokens.weight.normal_(0, 0.5)
    model.llava.lm_head.weight.normal_(0, 0.02)
    embeddings = model.vision_tower.embeddings
    embeddings.patch_embedding.weight.normal_(0, (3 * PATCH_SIZE**2) ** -0.5)
    # Sines of period 12, 6, 4 and 3 patches: shifting such a table cyclically is a rotation.
    angle = torch.arange(GRID_SIZE) * 2 * math.pi / GRID_SIZE
    waves = torch.stack([f(k * angle) for k in (1, 2, 3, 4) for f in (torch.sin, torch.cos)], 1)
    rows = waves[:, None].expand(GRID_SIZE, GRID_SIZE, -1)
    columns = waves[None].expand(GRID_SIZE, GRID_SIZE, -1)
    table = torch.cat([rows, columns], -1).flatten(0, 1)
    mixing = torch.randn(table.shape[1], VISION_WIDTH) * table.shape[1] ** -0.5
    embeddings.position_embedding.weight[1:] = 0.7 * table @ mixing


def _normal_by_fan_in(module: nn.Module, gain: float) -> None:
    """Redraw the matrices of `module` with standard deviation gain / sqrt(fan-in)."""
    for parameter in module.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0, gain * parameter.shape[1] ** -0.5)
