"""The sizes that define a model's modules: what a config.json says, or a recipe without one.

Plain dataclasses without torch, so that a recipe can hold them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class _Strict:
    # pydantic reads this where a recipe nests one of these classes; it needs no import here.
    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}


@dataclass(frozen=True, kw_only=True)
class TransformerShape(_Strict):
    """What the layers of a CLIP-like encoder read.

    Attributes:
        width: D, of the hidden states.
        intermediate_size: Of the MLP.
        num_layers: All of them, also those behind a select layer.
        num_heads: A divisor of ``width``.
        layer_norm_eps: Of every norm.
        activation: Name in transformers' ``ACT2FN``.
    """

    width: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    layer_norm_eps: float
    activation: str


@dataclass(frozen=True, kw_only=True)
class VisionShape(TransformerShape):
    """A vision tower: square pictures of ``image_size`` pixels, square patches."""

    image_size: int
    patch_size: int

    @property
    def grid_size(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


@dataclass(frozen=True, kw_only=True)
class TextShape(TransformerShape):
    """A CLIP text tower; E is ``embed_dim``."""

    vocab_size: int
    max_tokens: int
    embed_dim: int
    eos_token_id: int


@dataclass(frozen=True, kw_only=True)
class ProjectorShape(_Strict):
    """From vision features to the decoder.

    Attributes:
        width: What goes in: the tower's width, times the patches joined to one token.
        hidden_size: H, what comes out.
        bias: Whether the linear layers have one.
        activation: Between the two linear layers of an MLP; None where one linear layer is all.
    """

    width: int
    hidden_size: int
    bias: bool = True
    activation: str | None


@dataclass(frozen=True, kw_only=True)
class DecoderShape(_Strict):
    """A Llama or Mistral decoder.

    ``num_heads`` is a multiple of ``num_key_value_heads``; RoPE is the plain kind, without scaling.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    activation: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Architecture(_Strict):
    """All sizes of a model."""

    vision: VisionShape
    projector: ProjectorShape
    decoder: DecoderShape
