"""Names and shapes of all tensors of a model: what a checkpoint must hold, no more and no less."""

from __future__ import annotations

import torch
from torch import nn

from gap_export.families.common.modules.clip_text import ClipTextEncoder
from gap_export.families.common.modules.clip_vision import ClipVisionTower
from gap_export.families.common.modules.llama_decoder import LlamaDecoder, TokenEmbedding
from gap_export.families.common.modules.projector import build_projector
from gap_export.spec.architecture import Architecture, DecoderShape, TextShape, VisionShape

NEWLINE_KEY = "image_newline"


def expected_clip_llama(
    architecture: Architecture, *, newline: bool = False
) -> dict[str, tuple[int, ...]]:
    """CLIP tower, projector and Llama decoder, those parts that an export never reads included.

    Args:
        architecture: The sizes.
        newline: Whether there is the vector that ends a row of a tiled picture.

    Returns:
        Shape by our name: ``tower.*``, ``projector.*``, ``decoder.*``, ``lm_head.weight``.
    """
    expected = expected_clip_tower(architecture.vision)
    expected |= expected_language(architecture)
    if newline:
        expected[NEWLINE_KEY] = (architecture.decoder.hidden_size,)
    return expected


def expected_clip_tower(shape: VisionShape) -> dict[str, tuple[int, ...]]:
    """``tower.*`` of CLIP: all layers, and the norm behind them."""
    with torch.device("meta"):
        tower = ClipVisionTower(shape, num_layers=shape.num_layers)
        tower.post_layernorm = nn.LayerNorm(shape.width)
    return prefixed("tower.", tower)


def expected_language(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Projector, word embeddings, decoder and head: what all families have."""
    with torch.device("meta"):
        projector = build_projector(architecture.projector)
    return prefixed("projector.", projector) | expected_decoder(architecture.decoder)


def expected_decoder(shape: DecoderShape) -> dict[str, tuple[int, ...]]:
    """``decoder.*``, word embeddings included, and ``lm_head.weight``."""
    with torch.device("meta"):
        embedding, decoder = TokenEmbedding(shape), LlamaDecoder(shape)
    expected = prefixed("decoder.embed_tokens.", embedding)
    return expected | {decoder_key(key): size for key, size in shapes(decoder).items()}


def expected_text_tensors(shape: TextShape) -> dict[str, tuple[int, ...]]:
    """A CLIP text tower with its projection, by the names of :class:`ClipTextEncoder`."""
    with torch.device("meta"):
        return shapes(ClipTextEncoder(shape))


def decoder_key(key: str) -> str:
    """Our name of a tensor of :class:`LlamaDecoder`."""
    return key if key.startswith("lm_head.") else f"decoder.{key}"


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor of a module's state dict."""
    return {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}


def prefixed(prefix: str, module: nn.Module) -> dict[str, tuple[int, ...]]:
    """As :func:`shapes`, with a prefix before each name."""
    return {prefix + key: shape for key, shape in shapes(module).items()}
