"""The networks: tower, projector and decoder, a CLIP text tower beside them, training-only heads.

Shape letters: B images, N visual tokens, C vision width, H decoder width, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    LlamaModel,
    PretrainedConfig,
    Qwen2Model,
    Qwen3VLTextModel,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

from gap_export.evaluation.refshapes import COLORS, SHAPES
from refshapes_training.designs import Design
from refshapes_training.qwen_tower import QwenTower, qwen_vision_config
from refshapes_training.towers import VISION_WIDTH, VisionTower, normal_by_fan_in
from refshapes_training.vocabulary import (
    BOS,
    MAX_TEXT_TOKENS,
    PAD,
    Vocabulary,
    text_vocabulary,
    vocabulary_of,
)

DECODER_WIDTH = 160
DECODER_HEADS = 5
PROJECTION_WIDTH = 64
POINTER_LAYERS = (1, 2)
_DECODERS = {"llama": LlamaModel, "qwen2": Qwen2Model, "qwen3_vl": Qwen3VLTextModel}


class RefShapesModel(nn.Module):
    """One demo model, and the part of CLIP that it lacks; all that ends up in the checkpoint.

    Attributes:
        design: What it is.
        vocabulary: Its tokens.
        vision_tower, projector, decoder, lm_head: The model.
        text: Text tower, in a joint space with the vision tower by way of `visual_projection`.
    """

    def __init__(self, design: Design) -> None:
        """Build with random weights drawn from torch's global generator."""
        super().__init__()
        self.design = design
        self.vocabulary: Vocabulary = vocabulary_of(design.name)
        self.vision_tower = QwenTower(design) if design.tower == "qwen3_vl" else VisionTower(design)
        self.projector = _build_projector(design)
        self.decoder = _DECODERS[design.decoder](decoder_config(self.vocabulary))
        self.lm_head = nn.Linear(DECODER_WIDTH, len(self.vocabulary.tokens), bias=False)
        self.text = CLIPTextModelWithProjection(_text_config())
        self.visual_projection = nn.Linear(VISION_WIDTH, PROJECTION_WIDTH, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.66))
        self.patch_text_scale = nn.Parameter(torch.tensor(2.3))
        self.patch_text_bias = nn.Parameter(torch.tensor(-4.0))
        self._initialise()

    def encode_text(self, ids: Tensor) -> Tensor:
        """Text embeddings of `<s> words </s>`; int64 [B, T] -> [B, 64], not normalised."""
        return self.text(input_ids=ids).text_embeds

    def project(self, selected: Tensor, taps: Sequence[Tensor]) -> list[Tensor]:
        """What the decoder reads of visual tokens: at first, then behind its first layers.

        Args:
            selected: [B, N, J * C].
            taps: Of earlier layers of the tower, the same.

        Returns:
            One [B, N, H] tensor, and one for each tap.
        """
        if not isinstance(self.projector, nn.ModuleList):
            return [self.projector(selected)]
        shape = (*selected.shape[:2], -1)
        planes = zip(self.projector, (selected, *taps), strict=True)
        return [merger(plane.reshape(-1, VISION_WIDTH)).view(shape) for merger, plane in planes]

    def decode(
        self, embeds: Tensor, position_ids: Tensor, mask: Tensor, added: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Run the decoder with explicit ids and mask, without a cache.

        Args:
            embeds: [B, S, H].
            position_ids: int64 [A, B, S].
            mask: bool [B or 1, 1, S, S], True where a query may look.
            added: [B, N, H] each, added to the visual tokens behind the first layers.

        Returns:
            The normalised last state [B, S, H], and the state after every layer.
        """
        rotary = self._rotary(embeds, position_ids)
        start, end = self.design.visual_start, self.design.visual_end
        hidden, states = embeds, []
        for index, layer in enumerate(self.decoder.layers):
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, use_cache=False)
            if index < len(added):
                rest = hidden.shape[1] - end
                hidden = hidden + functional.pad(added[index], (0, 0, start, rest))
            states.append(hidden)
        return self.decoder.norm(hidden), states

    def attention(self, inputs: list[Tensor], position_ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Attention weights of every layer, which the fused kernels do not give.

        Args:
            inputs: The state that enters each layer, [B, S, H].
            position_ids: int64 [A, B, S].
            mask: bool [B, 1, S, S], True where a query may look.

        Returns:
            For each layer float32 [B, heads, S, S]; rows sum to 1.
        """
        cos, sin = self._rotary(inputs[0], position_ids)
        weights = []
        for layer, hidden in zip(self.decoder.layers, inputs, strict=True):
            normed, attention = layer.input_layernorm(hidden), layer.self_attn
            shape = (*normed.shape[:2], -1, attention.head_dim)
            query = attention.q_proj(normed).view(shape)
            key = attention.k_proj(normed).view(shape)
            if self.design.decoder == "qwen3_vl":
                query, key = attention.q_norm(query), attention.k_norm(key)
            query, key = (heads.transpose(1, 2) for heads in (query, key))
            query, key = apply_rotary_pos_emb(query, key, cos, sin)
            scores = (query @ key.transpose(2, 3)).float() * attention.scaling
            hidden_away = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
            weights.append(hidden_away.softmax(-1))
        return weights

    def _rotary(self, embeds: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        ids = position_ids if self.design.position_axes > 1 else position_ids[0]
        cos, sin = self.decoder.rotary_emb(embeds, ids)
        return cos, sin

    @torch.no_grad()
    def _initialise(self) -> None:
        """Scale matrices by fan-in: the libraries' 0.02 is meant for widths of thousands."""
        normal_by_fan_in(self.decoder.layers, 0.7)
        for name, parameter in self.decoder.layers.named_parameters():
            if name.endswith("_proj.bias"):
                parameter.zero_()
        normal_by_fan_in(self.projector, 1.0)
        self.decoder.embed_tokens.weight.normal_(0, 0.5)
        self.lm_head.weight.normal_(0, 0.02)


class VisionHeads(nn.Module):
    """Training-only: what a patch shows, read from the selected vision layer."""

    def __init__(self) -> None:
        """Build with random weights."""
        super().__init__()
        self.outputs = (len(COLORS) + 1, len(SHAPES) + 1, 4)
        self.linear = nn.Linear(VISION_WIDTH, sum(self.outputs))

    def forward(self, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Color logits, shape logits and box offsets; [B, N, 9], [B, N, 7], [B, N, 4]."""
        color, shape, offsets = self.linear(patches).float().split(self.outputs, -1)
        return color, shape, offsets


class LanguageHeads(nn.Module):
    """Training-only: place probes, pointers at the target, and alignment with word embeddings."""

    def __init__(self, design: Design) -> None:
        """Build with random weights."""
        super().__init__()
        self.outputs = (*design.tokens.num_rows_and_columns, 4)
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


def decoder_config(vocabulary: Vocabulary) -> PretrainedConfig:
    """Sizes of the decoder, in the terms of its own class."""
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": 10000.0}
    more: dict[str, object] = {}
    if vocabulary.design.decoder == "qwen3_vl":
        rope |= {"mrope_section": [6, 5, 5], "mrope_interleaved": True}
        more["head_dim"] = DECODER_WIDTH // DECODER_HEADS
    return _DECODERS[vocabulary.design.decoder].config_class(
        vocab_size=len(vocabulary.tokens),
        hidden_size=DECODER_WIDTH,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=DECODER_HEADS,
        num_key_value_heads=DECODER_HEADS,
        max_position_embeddings=512,
        rope_parameters=rope,
        rms_norm_eps=1e-6,
        bos_token_id=BOS,
        eos_token_id=vocabulary.eos,
        pad_token_id=PAD,
        tie_word_embeddings=False,
        **more,
    )


def _build_projector(design: Design) -> nn.Module:
    width = VISION_WIDTH * design.join[0] * design.join[1]
    if design.projector == "merger":
        config = qwen_vision_config(design, out_hidden_size=DECODER_WIDTH)
        taps = [Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=True) for _ in design.taps]
        return nn.ModuleList([Qwen3VLVisionPatchMerger(config), *taps])
    if design.projector == "linear":
        return nn.Linear(width, DECODER_WIDTH)
    norm = [nn.LayerNorm(width)] if design.projector == "internvl" else []
    return nn.Sequential(
        *norm,
        nn.Linear(width, DECODER_WIDTH),
        nn.GELU(),
        nn.Linear(DECODER_WIDTH, DECODER_WIDTH),
    )


def _text_config() -> CLIPTextConfig:
    vocabulary = text_vocabulary()
    return CLIPTextConfig(
        vocab_size=len(vocabulary.tokens),
        hidden_size=VISION_WIDTH,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TEXT_TOKENS,
        projection_dim=PROJECTION_WIDTH,
        bos_token_id=BOS,
        eos_token_id=vocabulary.eos,
        pad_token_id=PAD,
    )
