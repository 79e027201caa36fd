"""The sizes that define a model's modules: what a config.json says, or a recipe without one.

Plain dataclasses without torch, so that a recipe can hold them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gap_export.spec.manifest.facts import Strict


@dataclass(frozen=True, kw_only=True)
class TransformerShape(Strict):
    """What the layers of a CLIP-like encoder read.

    Attributes:
        width: D, width of the hidden states.
        intermediate_size: Inner width of the MLP.
        num_layers: All layers, also those behind a select layer.
        num_heads: A divisor of ``width``.
        layer_norm_eps: Epsilon of every norm.
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
    """A vision tower: images of one size, square patches.

    Attributes:
        image_size: Pixels of the side of a square image, or height and width of a canvas.
        patch_size: Pixels of the side of a patch.
        position_side: Side of the square table of learned positions that is interpolated to the
            canvas; None where there is none, or the positions are those of the canvas.
        window_size: Pixels of the side of a window, whose patches see each other alone; None where
            every patch sees all.
        full_attention: Layers, counted from 0, in which every patch sees all nevertheless.
        grids: Rows and columns of visual tokens of each canvas, where there are several; see
            ``ImageSpec.grids``.
        taps: Layers whose features go to the decoder beside the last one's (DeepStack).
    """

    image_size: int | tuple[int, int]
    patch_size: int
    position_side: int | None = None
    window_size: int | None = None
    full_attention: tuple[int, ...] = ()
    taps: tuple[int, ...] = ()
    grids: tuple[tuple[int, int], ...] = ()

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of an image in pixels."""
        size = self.image_size
        return size if isinstance(size, tuple) else (size, size)

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        height, width = self.canvas
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of one image, CLS not counted."""
        rows, cols = self.patch_grid
        return rows * cols


@dataclass(frozen=True, kw_only=True)
class TextShape(TransformerShape):
    """A CLIP text tower; E is ``embed_dim``."""

    vocab_size: int
    max_tokens: int
    embed_dim: int
    eos_token_id: int


@dataclass(frozen=True, kw_only=True)
class ProjectorShape(Strict):
    """From vision features to the decoder.

    Attributes:
        width: What goes in: the tower's width, times the patches joined to one token.
        hidden_size: H, what comes out.
        bias: Whether the linear layers have one.
        activation: Between the two linear layers of an MLP; None where one linear layer is all.
        joined_rows: Rows of patches that are joined to one token; the width says how many columns.
        inner_size: Width between the two linear layers; None where it is ``hidden_size``.
        norm: What stands before the first linear layer, if anything.
        norm_eps: Its epsilon.
        norm_width: Over how many features it goes: those of one patch (Qwen's merger), or None for
            all of a token (InternVL).
        num_taps: Planes of features behind the first, each with a projector of its own, whose norm
            is over all patches of a token (DeepStack, Qwen3-VL).
    """

    width: int
    hidden_size: int
    bias: bool = True
    activation: str | None
    joined_rows: int = 1
    inner_size: int | None = None
    norm: Literal["layer_norm", "rms_norm"] | None = None
    norm_eps: float = 1e-5
    norm_width: int | None = None
    num_taps: int = 0

    @property
    def features_size(self) -> int:
        """Width of a token's features: what is projected, then a plane for each tap."""
        return self.width * (1 + self.num_taps)


@dataclass(frozen=True, kw_only=True)
class DecoderShape(Strict):
    """What a decoder is made of.

    The decoder in ``families/common`` serves Llama, Mistral, Qwen2 and Qwen3. Another family's own
    decoder reads of this what it has use for.

    Attributes:
        hidden_size: H, without planes that are added behind later layers (see ``num_taps``).
        intermediate_size: Inner width of the MLP.
        num_layers: Layers, each with a KV cache.
        num_heads: Query heads, a multiple of ``num_key_value_heads``.
        num_key_value_heads: Heads that are cached.
        head_dim: Width of a head, an even number; ``num_heads * head_dim`` need not be
            ``hidden_size``.
        vocab_size: Rows of the word embeddings and of the head.
        max_position_embeddings: Position ids are below it.
        rms_norm_eps: Epsilon of every norm.
        rope_theta: Base of the frequencies by which RoPE turns.
        rotary_dim: Leading channels of a head that RoPE turns; None for all of them.
        rope_sections: How many frequencies each axis of a position turns (M-RoPE: time, row,
            column); empty where a position is one number.
        rope_interleaved: Whether the axes take turns in the frequencies (Qwen3-VL), or each has a
            run of its own (Qwen2.5-VL).
        activation: Name in transformers' ``ACT2FN``.
        attention_bias: Which of attention's four linear layers have a bias: all or none of them, or
            queries, keys and values without the output.
        mlp_bias: Whether the MLP's linear layers have a bias.
        qk_norm: Whether each head of queries and keys is normalized before it is turned.
        tied_embeddings: Whether the head is the word embeddings, so that checkpoints leave it out.
        num_taps: How many of the first layers are followed by an input of their own: plane i + 1 of
            ``inputs_embeds`` is added behind layer i (DeepStack).
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
    rotary_dim: int | None = None
    rope_sections: tuple[int, ...] = ()
    rope_interleaved: bool = False
    activation: str = "silu"
    attention_bias: bool | Literal["qkv"] = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_embeddings: bool = False
    num_taps: int = 0

    @property
    def embeds_size(self) -> int:
        """Width of ``inputs_embeds``: the hidden state, then a plane for each tap."""
        return self.hidden_size * (1 + self.num_taps)

    @property
    def num_frequencies(self) -> int:
        """By how many angles RoPE turns a head; each turns two channels."""
        return (self.head_dim if self.rotary_dim is None else self.rotary_dim) // 2

    @property
    def position_axes(self) -> Literal[1, 3]:
        """A, numbers that a position is made of."""
        return 3 if self.rope_sections else 1

    def frequency_axes(self) -> tuple[int, ...]:
        """For each frequency of RoPE the axis of a position that it turns by."""
        if not self.rope_sections:
            return (0,) * self.num_frequencies
        if not self.rope_interleaved:
            return tuple(
                axis for axis, number in enumerate(self.rope_sections) for _ in range(number)
            )
        axes = [0] * self.num_frequencies
        for axis, number in enumerate(self.rope_sections[1:], start=1):
            for turn in range(number):
                axes[axis + turn * self.position_axes] = axis
        return tuple(axes)


@dataclass(frozen=True, kw_only=True)
class Architecture(Strict):
    """All sizes of a model.

    Attributes:
        vision: The vision tower's.
        projector: What goes from one to the other.
        decoder: The decoder's.
    """

    vision: VisionShape
    projector: ProjectorShape
    decoder: DecoderShape

    @property
    def token_grid(self) -> tuple[int, int]:
        """Rows and columns of visual tokens; (0, 0) where patches cannot be joined so."""
        rows, cols = self.vision.patch_grid
        down, across = self.joined_patches
        if not across or rows % down or cols % across:
            return 0, 0
        return rows // down, cols // across

    @property
    def joined_patches(self) -> tuple[int, int]:
        """Rows and columns of patches in one token; no columns where the widths do not fit."""
        down = self.projector.joined_rows
        across, rest = divmod(self.projector.width, self.vision.width * down)
        return down, 0 if rest else across
