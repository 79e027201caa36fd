"""CLIP's text tower, for pruners that read the expression.

Shape letters: B rows, T text tokens, D width, E CLIP embedding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig

from gap_export.families.clip_layers import ClipEncoder, ClipShape
from gap_export.families.limits import require
from gap_export.families.loading import KeyLayout, match_tensors, parse_config, shapes
from gap_export.recipe import TextTower
from gap_export.weights import TensorRef, index_checkpoint, index_files

# Configs written before transformers fixed CLIP's end-of-text id say 2; for those the
# end of text is the largest id of a row (huggingface/transformers#24773).
_LEGACY_EOS_ID = 2
# float32 holds every integer up to here; the pooling compares candidates times slots.
_MAX_KEY = 1 << 24
_VISUAL_PROJECTION = "visual_projection.safetensors"
_KEYS = KeyLayout(
    prefixes=(("text_model.", ""),), ignored_suffixes=(".embeddings.position_ids",), tied={}
)


@dataclass(frozen=True, kw_only=True)
class ClipTextShape(ClipShape):
    """A text tower; E is ``embed_dim``."""

    vocab_size: int
    max_tokens: int
    embed_dim: int
    eos_token_id: int


@dataclass(frozen=True, kw_only=True)
class TextTowerSource:
    """A text tower's folder, checked.

    Attributes:
        tower: What the recipe says.
        shape: Of the folder's ``CLIPTextModelWithProjection``.
        refs: For each key of :class:`ClipTextEncoder`, where its bytes are.
        visual_projection: [E, vision width], from the vision tower into the joint space.
        tokenizer: The tower's tokenizer.json.
        files: All files that were read.
    """

    tower: TextTower
    shape: ClipTextShape
    refs: Mapping[str, TensorRef]
    visual_projection: TensorRef
    tokenizer: Path
    files: tuple[Path, ...]


def read_text_tower(tower: TextTower, checkpoint: Path, *, vision_width: int) -> TextTowerSource:
    """Check a text tower: a ``CLIPTextModelWithProjection`` and ``visual_projection.safetensors``.

    Raises:
        CheckpointError: the folder, a file or a tensor is missing, damaged or does not match.
    """
    folder = checkpoint / tower.folder
    found = index_checkpoint(folder)
    config_file = folder / "config.json"
    shape = _text_shape(
        parse_config(CLIPTextConfig, config_file, num_tensors=len(found)), config_file
    )
    with torch.device("meta"):
        expected = shapes(ClipTextEncoder(shape))
    refs = match_tensors(found, expected, _KEYS, where=folder)
    projection_file = folder / _VISUAL_PROJECTION
    projection = match_tensors(
        index_files([projection_file]),
        {"visual_projection.weight": (shape.embed_dim, vision_width)},
        _KEYS,
        where=projection_file,
    )["visual_projection.weight"]
    weight_files = {ref.file for ref in (*found.values(), projection)}
    return TextTowerSource(
        tower=tower,
        shape=shape,
        refs=refs,
        visual_projection=projection,
        tokenizer=folder / "tokenizer.json",
        files=(config_file, *sorted(weight_files)),
    )


class ClipTextEncoder(nn.Module):
    """Weight names are those of ``CLIPTextModelWithProjection`` without ``text_model.``."""

    def __init__(self, shape: ClipTextShape) -> None:
        super().__init__()
        self.eos_token_id = shape.eos_token_id
        self.embeddings = _TextEmbeddings(shape)
        self.encoder = ClipEncoder(shape, num_layers=shape.num_layers)
        self.final_layer_norm = nn.LayerNorm(shape.width, eps=shape.layer_norm_eps)
        self.text_projection = nn.Linear(shape.width, shape.embed_dim, bias=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embed texts. Causal, so whatever follows the end-of-text token changes nothing.

        Args:
            input_ids: int64 [B, T], padded on the right.

        Returns:
            text_embeds [B, E], not normalised.
        """
        slots = torch.arange(input_ids.shape[1], device=input_ids.device)
        causal = slots.unsqueeze(0) <= slots.unsqueeze(1)
        hidden, _ = self.encoder(self.embeddings(input_ids, slots), causal)
        end = self._end_of_text(input_ids, slots)
        index = end[:, None, None].expand(-1, 1, hidden.shape[2])
        pooled = torch.gather(self.final_layer_norm(hidden), 1, index)[:, 0]
        embeds: torch.Tensor = self.text_projection(pooled)
        return embeds

    def _end_of_text(self, input_ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """Slot of each row's first end-of-text token, int64 [B].

        Equal candidates are told apart by slot, since runtimes differ in which ArgMax returns.
        """
        legacy = self.eos_token_id == _LEGACY_EOS_ID
        candidates = input_ids if legacy else torch.eq(input_ids, self.eos_token_id).long()
        length = input_ids.shape[1]
        # float32 holds these integers exactly, see _MAX_KEY.
        keys = (candidates * length + (length - 1 - slots)).to(torch.float32)
        return keys.argmax(dim=-1)


class _TextEmbeddings(nn.Module):
    def __init__(self, shape: ClipTextShape) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(shape.vocab_size, shape.width)
        self.position_embedding = nn.Embedding(shape.max_tokens, shape.width)

    def forward(self, input_ids: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        embedded: torch.Tensor = self.token_embedding(input_ids) + self.position_embedding(slots)
        return embedded


def _text_shape(config: Any, file: Path) -> ClipTextShape:
    """Typed form of a ``CLIPTextConfig``, whose own annotations leave every field open."""
    eos, num_ids = config.eos_token_id, config.vocab_size
    require(
        type(eos) is int and 0 <= eos < num_ids,
        "eos_token_id",
        eos,
        f"one id, 0..{num_ids - 1}",
        where=file,
    )
    slots = config.max_position_embeddings
    # See ClipTextEncoder._end_of_text: ids are compared only by the old convention.
    candidates = num_ids if eos == _LEGACY_EOS_ID else 2
    require(
        slots * candidates <= _MAX_KEY,
        "max_position_embeddings",
        slots,
        f"at most {_MAX_KEY // candidates}",
        where=file,
    )
    return ClipTextShape(
        width=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        layer_norm_eps=config.layer_norm_eps,
        activation=config.hidden_act,
        vocab_size=config.vocab_size,
        max_tokens=config.max_position_embeddings,
        embed_dim=config.projection_dim,
        eos_token_id=config.eos_token_id,
    )
