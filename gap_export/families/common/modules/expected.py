"""Names and shapes of all tensors of a model: what a checkpoint must hold, no more and no less."""

from __future__ import annotations

import torch
from torch import nn

from gap_export.families.common.decoder_kind import LLAMA, DecoderKind
from gap_export.families.common.modules.clip_text import ClipTextEncoder
from gap_export.families.common.modules.clip_vision import ClipVisionTower
from gap_export.families.common.modules.decoder_stack import TokenEmbedding
from gap_export.families.common.modules.projector import build_projector
from gap_export.spec.architecture import Architecture, DecoderShape, TextShape, VisionShape

NEWLINE_KEY = "image_newline"
Shapes = dict[str, tuple[int, ...]]


def clip_norm_behind(shape: VisionShape) -> Shapes:
    """The norm behind CLIP's last layer, which every checkpoint holds and no tower here runs."""
    return {f"tower.post_layernorm.{leaf}": (shape.width,) for leaf in ("weight", "bias")}


def expected_clip_tower(shape: VisionShape) -> Shapes:
    """``tower.*`` of CLIP: all layers, and the norm behind them."""
    with torch.device("meta"):
        tower = ClipVisionTower(shape, num_layers=shape.num_layers)
    return prefixed("tower.", tower) | clip_norm_behind(shape)


def expected_language(architecture: Architecture, kind: DecoderKind = LLAMA) -> Shapes:
    """``projector.*``, and :func:`expected_decoder`."""
    with torch.device("meta"):
        projector = build_projector(architecture.projector)
    return prefixed("projector.", projector) | expected_decoder(architecture.decoder, kind)


def expected_decoder(shape: DecoderShape, kind: DecoderKind = LLAMA) -> Shapes:
    """``decoder.*``, word embeddings included, and ``lm_head.*``."""
    with torch.device("meta"):
        embedding, decoder = TokenEmbedding(shape), kind.module(shape)
    expected = prefixed("decoder.embed_tokens.", embedding)
    return expected | {decoder_key(key): size for key, size in prefixed("", decoder).items()}


def expected_text_tensors(shape: TextShape) -> Shapes:
    """A CLIP text tower with its projection, by the names of :class:`ClipTextEncoder`."""
    with torch.device("meta"):
        return prefixed("", ClipTextEncoder(shape))


def decoder_key(key: str) -> str:
    """Our name of a tensor of a decoder's module."""
    return key if key.startswith("lm_head.") else f"decoder.{key}"


def prefixed(prefix: str, module: nn.Module) -> Shapes:
    """Shape of each tensor of a module's state dict, a prefix before each name."""
    return {prefix + key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
