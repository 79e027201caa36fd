"""GAP in plain numpy: which position id each surviving token keeps.

Grounding-Aware Token Pruning (arXiv 2506.21873) gives every surviving token the position id it had
*before* pruning. Everything here is a matter of one table, ``kept_positions``:
entry ``p`` is the index, in the unpruned sequence, of the prompt token that is fed ``p``-th.

Runtimes feed *slots* 0, 1, 2, ... over the pruned sequence; :func:`gap_remap` turns slots into
original ids, during prefill and, past the table's end, during decode. The ``GapRemap`` graph node
computes the same.

An image that is cut into tiles is like any other once ``spec.tiles`` has put its tokens in order.

Shape letters: B rows, S fed tokens, P prompt tokens after pruning, N visual tokens before pruning,
K kept visual tokens, L prompt tokens before pruning.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import UsageError

Int64Array = NDArray[np.int64]
PositionMode = Literal["gap", "compact"]


@dataclass(frozen=True, kw_only=True)
class VisualSpan:
    """One image's place in the unpruned prompt.

    Attributes:
        start: Index of the image's first visual token in the unpruned sequence.
        num_visual_tokens: N, visual tokens before pruning.
        keep_indices: int64 [K'], unpruned index (0..N-1) of each emitted token, in feed order.
    """

    start: int
    num_visual_tokens: int
    keep_indices: Int64Array


def num_kept_tokens(keep_ratio: float, num_visual_tokens: int) -> int:
    """K = clamp(floor(keep_ratio * N + 0.5), 1, N): round half up, never none.

    Raises:
        UsageError: keep_ratio is not a number in (0, 1], or N is below 1.
    """
    check_keep_ratio(keep_ratio)
    if num_visual_tokens < 1:
        raise UsageError(
            "a model needs at least one visual token", seen=num_visual_tokens, allowed=">= 1"
        )
    return min(max(math.floor(keep_ratio * num_visual_tokens + 0.5), 1), num_visual_tokens)


def check_keep_ratio(keep_ratio: float) -> None:
    """Refuse a keep ratio outside (0, 1] (NaN included).

    Raises:
        UsageError: keep_ratio is not a number in (0, 1].
    """
    if not 0.0 < keep_ratio <= 1.0:
        raise UsageError(
            "keep ratio out of range",
            seen=keep_ratio,
            allowed="0 < keep <= 1, e.g. 0.3 keeps 30 % of the visual tokens",
        )


def build_kept_positions(*, unpruned_length: int, spans: Sequence[VisualSpan]) -> Int64Array:
    """Position table of one prompt.

    Args:
        unpruned_length: L, prompt tokens before pruning, all N visual tokens of each image counted.
        spans: The images, in prompt order, not overlapping.

    Returns:
        int64 [P] with P = L - sum(N - K'): for each fed token its index in the unpruned sequence.

    Raises:
        UsageError: a span lies outside the prompt, overlaps the one before, or keeps an index
            outside 0..N-1; or the last prompt token is visual (it must survive, since decode
            continues from it).
    """
    pieces: list[Int64Array] = []
    cursor = 0
    for span in spans:
        end = span.start + span.num_visual_tokens
        if span.start < cursor or end > unpruned_length:
            raise UsageError(
                "a visual span does not fit the prompt",
                seen=f"tokens {span.start}..{end - 1}",
                allowed=f"within {cursor}..{unpruned_length - 1}, after the span before it",
            )
        keep = np.asarray(span.keep_indices, dtype=np.int64)
        if keep.ndim != 1 or keep.size < 1:
            raise UsageError(
                "keep_indices must be a non-empty vector", seen=f"shape {list(keep.shape)}"
            )
        if keep.min() < 0 or keep.max() >= span.num_visual_tokens:
            raise UsageError(
                "keep_indices out of range",
                seen=f"{keep.min()}..{keep.max()}",
                allowed=f"0..{span.num_visual_tokens - 1}",
            )
        pieces.append(np.arange(cursor, span.start, dtype=np.int64))
        pieces.append(span.start + keep)
        cursor = end
    if cursor >= unpruned_length:
        raise UsageError(
            "the prompt must end with a token that is not visual",
            seen=f"{unpruned_length} tokens, the last of them visual",
            allowed="at least one text token after the image",
        )
    pieces.append(np.arange(cursor, unpruned_length, dtype=np.int64))
    return np.concatenate(pieces)


def compact_positions(length: int) -> Int64Array:
    """The naive table, int64 [P]: survivors re-numbered 0, 1, 2, ... ("shifted" in the paper)."""
    return np.arange(length, dtype=np.int64)


def stack_kept_positions(rows: Sequence[Int64Array]) -> Int64Array:
    """Stack tables of different length into int64 [B, P].

    A shorter row is continued on the right by last+1, last+2, ...: exactly what
    :func:`gap_remap` computes past a table's end, so padding changes nothing.

    Raises:
        UsageError: there are no rows, or one is empty.
    """
    if not rows or any(row.ndim != 1 or row.size == 0 for row in rows):
        raise UsageError("position tables must be non-empty vectors", seen=len(rows))
    length = max(row.size for row in rows)
    table = np.empty((len(rows), length), dtype=np.int64)
    for target, row in zip(table, rows, strict=True):
        target[: row.size] = row
        target[row.size :] = row[-1] + 1 + np.arange(length - row.size, dtype=np.int64)
    return table


def slots_from_mask(attention_mask: NDArray[Any]) -> Int64Array:
    """Slots of a left-padded batch: cumsum(mask) - 1, never negative.

    Args:
        attention_mask: [B, T], 1 for a token, 0 for padding on the left.

    Returns:
        int64 [B, T]; padding gets slot 0, the first real token of a row slot 0, then 1, 2, ...
    """
    slots = np.cumsum(attention_mask.astype(np.int64), axis=1) - 1
    return np.maximum(slots, 0)


def gap_remap(position_ids: Int64Array, kept_positions: Int64Array) -> Int64Array:
    """Original ids of slots; the maths of the ``GapRemap`` node.

    Args:
        position_ids: int64 [B, S], slots 0, 1, 2, ... over the pruned sequence.
        kept_positions: int64 [B, P] from :func:`build_kept_positions`.

    Returns:
        int64 [B, S]: ``kept[slot]`` for slot < P, then ``kept[P-1] + 1 + (slot - P)``, that is
        ``kept[min(slot, P-1)] + slot - min(slot, P-1)``: decode continues from the unpruned length.

    Raises:
        UsageError: the arrays are not [B, S] and [B, P] of one B, P is 0, or a slot is negative.
    """
    if position_ids.ndim != 2 or kept_positions.ndim != 2:
        raise UsageError(
            "GapRemap takes two matrices",
            seen=f"position_ids {list(position_ids.shape)}, "
            f"kept_positions {list(kept_positions.shape)}",
            allowed="[B, S] and [B, P]",
        )
    if position_ids.shape[0] != kept_positions.shape[0] or kept_positions.shape[1] == 0:
        raise UsageError(
            "kept_positions does not fit position_ids",
            seen=f"{list(position_ids.shape)} and {list(kept_positions.shape)}",
            allowed="[B, S] and [B, P] with the same B and P >= 1",
        )
    if position_ids.size and int(position_ids.min()) < 0:
        raise UsageError("slots are never negative", seen=int(position_ids.min()), allowed=">= 0")
    within = np.minimum(position_ids, kept_positions.shape[1] - 1)
    in_table = np.take_along_axis(kept_positions, within, axis=1)
    original: Int64Array = in_table + (position_ids - within)
    return original
