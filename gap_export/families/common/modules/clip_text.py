"""CLIP's text tower, for pruners that read the expression.

Shape letters: B rows, T text tokens, D width, E CLIP embedding.
"""

from __future__ import annotations

import torch
from torch import nn

from gap_export.families.common.modules.attention import mask_bias
from gap_export.families.common.modules.clip_layers import ClipEncoder
from gap_export.spec.architecture import TextShape

# Configs written before transformers fixed CLIP's end-of-text id say 2; for those the
# end of text is the largest id of a row (huggingface/transformers#24773).
LEGACY_EOS_ID = 2


class ClipTextEncoder(nn.Module):
    """Weight names are those of ``CLIPTextModelWithProjection`` without ``text_model.``."""

    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.eos_token_id = shape.eos_token_id
        self.embeddings = _TextEmbeddings(shape)
        self.encoder = ClipEncoder(shape, num_layers=shape.num_layers)
        self.final_layer_norm = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)
        self.text_projection = nn.Linear(shape.width, shape.embed_dim, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed texts. Causal, so what follows the end-of-text token changes nothing.

        Args:
            input_ids: int64 [B, T], padded on the right.

        Returns:
            text_embeds [B, E], not normalized.
        """
        slots = torch.arange(input_ids.shape[1], device=input_ids.device)
        causal = slots.unsqueeze(0) <= slots.unsqueeze(1)
        hidden, _ = self.encoder(self.embeddings(input_ids, slots), mask_bias(causal))
        end = self._end_of_text(input_ids, slots)
        index = end[:, None, None].expand(-1, 1, hidden.shape[2])
        pooled = torch.gather(self.final_layer_norm(hidden), 1, index)[:, 0]
        embeds: torch.Tensor = self.text_projection(pooled)
        return embeds

    def _end_of_text(self, input_ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Slot of each row's first end-of-text token, int64 [B].

        Equal candidates are told apart by slot, since runtimes differ in which ArgMax returns.
        """
        legacy = self.eos_token_id == LEGACY_EOS_ID
        candidates = input_ids if legacy else torch.eq(input_ids, self.eos_token_id).long()
        length = input_ids.shape[1]
        # float32 holds these integers exactly, see the reader of its config.
        keys = (candidates * length + (length - 1 - slots)).to(torch.float32)
        return keys.argmax(dim=-1)


class _TextEmbeddings(nn.Module):
    def __init__(self, shape: TextShape) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.position_embedding = nn.Embedding(shape.max_tokens, shape.width)

    def forward(self, input_ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.token_embedding(input_ids) + self.position_embedding(slots)
        return embedded
