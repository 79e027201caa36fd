"""Attention with a KV cache and rotary positions, for any decoder.

Written out so that an export sees plain operators, and so that the lowerings to fused ones find
them: RoPE reads the position ids that are fed and nothing else, the mask is a key mask over cache
slots, the cache goes in and comes out.

Shape letters: B rows, S fed tokens, T = past + S slots, A axes of a position, F frequencies,
d head width.
"""

from __future__ import annotations

import torch

from gap_export.spec.architecture import DecoderShape

Rotation = tuple[torch.Tensor, torch.Tensor]


def mask_bias(allowed: torch.Tensor) -> torch.Tensor:
    """What is added to scores: 0 where a key is allowed (bool), elsewhere the finite minimum.

    Float32, to which scores are cast before the sum: their own size is below half a unit in the
    minimum's last place (about 1e31), so that a blocked score comes out as the minimum exactly, and
    an allowed one as it was. In float16 the sum could be -inf, and NaN a row that may see nothing
    (padding).
    """
    return torch.where(allowed, 0.0, torch.finfo(torch.float32).min).to(torch.float32)


def key_bias(
    attention_mask: torch.Tensor, *, num_queries: int, past: int, proportional: bool = False
) -> torch.Tensor:
    """Float32 [B, 1, S, T]: blocks what is hidden or in the future; the same for all layers.

    Causality goes by slot, not by id.

    Args:
        attention_mask: int64 [B, T], 0 for a hidden slot.
        num_queries: S.
        past: Slots before the first query's.
        proportional: Proportional attention (Token Merging, arXiv 2210.09461): a slot counts as so
            many tokens as its entry of the mask says, whose log is added to its scores.
    """
    device = attention_mask.device
    key_slots = torch.arange(past + num_queries, device=device)
    query_slots = torch.arange(num_queries, device=device) + past
    causal = key_slots.unsqueeze(0) <= query_slots.unsqueeze(1)
    allowed = causal & (attention_mask != 0).unsqueeze(1).unsqueeze(1)
    if not proportional:
        return mask_bias(allowed)
    # The log of 1 is 0 to the bit, so that a mask of zeros and ones means what it always does.
    counts = attention_mask.clamp(min=1).to(torch.float32).log()
    lowest = torch.finfo(torch.float32).min
    return torch.where(allowed, counts.unsqueeze(1).unsqueeze(1), lowest)


def rope_frequencies(theta: float, width: int) -> torch.Tensor:
    """Float32 [width / 2]: theta ** (-2i / width) (RoFormer, arXiv 2104.09864)."""
    # On the CPU, not on the default device: these are values, also of a model without weights.
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    return 1.0 / (theta**exponents)


def rope_rotation(
    position_ids: torch.Tensor,
    inv_freq: torch.Tensor,
    dtype: torch.dtype,
    axes: torch.Tensor | None = None,
) -> Rotation:
    """Cosines and sines by which heads are turned, worked out in float32 in any dtype.

    Args:
        position_ids: int64 [B, S], or [A, B, S] with ``axes``.
        inv_freq: float32 [F].
        dtype: What they end in.
        axes: int64 [F], the axis that each frequency turns by; None for positions of one axis.

    Returns:
        Both [B, 1, S, 2 * F].
    """
    if axes is None:
        ids = position_ids.to(torch.float32).unsqueeze(1).unsqueeze(3)
    else:
        chosen = position_ids.index_select(0, axes).permute(1, 2, 0)
        ids = chosen.to(torch.float32).unsqueeze(1)
    half = ids * inv_freq
    angles = torch.cat((half, half), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: torch.Tensor, rotation: Rotation, width: int | None = None) -> torch.Tensor:
    """Turn heads [B, heads, S, d], or their leading ``width`` channels alone."""
    if width is not None:
        turned = rotate(heads[..., :width], rotation)
        return torch.cat((turned, heads[..., width:]), dim=-1)
    cos, sin = rotation
    half = heads.shape[-1] // 2
    first, second = heads[..., :half], heads[..., half:]
    turned = torch.cat((-second, first), dim=-1)
    return heads * cos + turned * sin


def split_heads(
    projected: torch.Tensor, size: tuple[int, int], num_heads: int, head_dim: int
) -> torch.Tensor:
    """A matrix [B * S, heads * d] to [B, heads, S, d]; ``size`` is (B, S)."""
    return projected.reshape(*size, num_heads, head_dim).transpose(1, 2)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past: tuple[torch.Tensor, torch.Tensor],
    bias: torch.Tensor,
    shape: DecoderShape,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Grow the cache, and mix its values.

    Args:
        query: [B, heads, S, d].
        key: [B, key-value heads, S, d].
        value: As the key.
        past: Keys and values of the slots before, [B, key-value heads, past, d].
        bias: float32 [B, 1, S, T], see :func:`key_bias`.
        shape: The decoder's.

    Returns:
        The mixed values as a matrix [B * S, heads * d], then keys and values of all T slots.
    """
    key, value = torch.cat((past[0], key), dim=2), torch.cat((past[1], value), dim=2)
    shared = shape.num_heads // shape.num_key_value_heads
    scores = torch.matmul(query, _repeat(key, shared).transpose(2, 3)) * shape.head_dim**-0.5
    # Cast first: softmax's own dtype argument is exported as a cast of its result.
    weights = torch.softmax(scores.to(torch.float32) + bias, dim=-1).to(query.dtype)
    mixed = torch.matmul(weights, _repeat(value, shared)).transpose(1, 2)
    return mixed.reshape(-1, shape.num_heads * shape.head_dim), key, value


def _repeat(heads: torch.Tensor, groups: int) -> torch.Tensor:
    """[B, key-value heads, T, d] to [B, heads, T, d]; query head h reads head h // groups."""
    if groups == 1:
        return heads
    batch, num_heads, length, width = heads.shape
    wide = heads.unsqueeze(2).expand(batch, num_heads, groups, length, width)
    return wide.reshape(batch, num_heads * groups, length, width)
