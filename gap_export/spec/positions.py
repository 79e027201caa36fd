"""GAP in plain numpy: which position id each surviving token keeps.

Grounding-Aware Token Pruning (arXiv 2506.21873) gives every surviving token the position id it had
*before* pruning. Two tables say so. ``kept_positions`` holds *indices*: entry ``p`` is the index,
in the unpruned sequence, of the prompt token that is fed ``p``-th. The *id table* holds what RoPE
sees of each of them. With one position axis the id of a token is its index, and both tables are
the same; with three (M-RoPE: time, row, column) an image takes up far fewer ids than tokens.
:func:`build_id_table` is the one place where indices become ids.

Runtimes feed *slots* 0, 1, 2, ... over the pruned sequence; :func:`gap_remap` turns slots into
original ids, during prefill and, past the table's end, during decode. The ``GapRemap`` graph node
computes the same.

An image that is cut into tiles is like any other once ``spec.tiles`` has put its tokens in order.

Shape letters: A position axes, B rows, S fed tokens, P prompt tokens after pruning, N visual tokens
before pruning, K kept visual tokens, L prompt tokens before pruning.
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
# Position ids that a bundle may be made with.
PositionMode = Literal["gap", "compact"]
# Those a prompt can be given; ``text-shifted`` is an experiment, see :func:`build_id_table`.
PositionRule = Literal["gap", "compact", "text-shifted"]


@dataclass(frozen=True, kw_only=True)
class VisualSpan:
    """One image's place in the unpruned prompt.

    Attributes:
        start: Index of the image's first visual token in the unpruned sequence.
        num_visual_tokens: N, visual tokens before pruning.
        keep_indices: int64 [K'], unpruned index (0..N-1) of each emitted token, in feed order.
        grid: Rows and columns of the visual tokens, in raster order. Three axes need it.
    """

    start: int
    num_visual_tokens: int
    keep_indices: Int64Array
    grid: tuple[int, int] | None = None


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
    """Index table of one prompt.

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


def build_id_table(
    kept_positions: Int64Array,
    *,
    unpruned_length: int,
    spans: Sequence[VisualSpan],
    position_axes: int = 1,
    rule: PositionRule = "gap",
) -> Int64Array:
    """Ids of the tokens of one prompt that are fed: what ``GapRemap`` reads.

    Args:
        kept_positions: int64 [P] from :func:`build_kept_positions`, of the same prompt.
        unpruned_length: L.
        spans: The images, in prompt order.
        position_axes: A, 1 or 3.
        rule: ``gap``: each token keeps its id. The rest are naive baselines. ``compact``: its
            slot, on all axes ("shifted" in the paper). ``text-shifted``: visual tokens keep their
            ids, and text goes on behind the largest id that is *left* of the image. That is GAP
            wherever the last token of the longest axis survives, and wrong wherever it does not.

    Returns:
        int64 [P] with one axis, [A, P] with several.

    Raises:
        UsageError: as :func:`unpruned_ids`.
    """
    if rule == "compact":
        ids = np.tile(compact_positions(len(kept_positions)), (position_axes, 1))
    else:
        ids = unpruned_ids(unpruned_length, spans, position_axes=position_axes)
        if rule == "text-shifted":
            for span in spans:
                end = span.start + span.num_visual_tokens
                left = ids[:, span.start + span.keep_indices].max()
                ids[:, end:] += left + 1 - ids[0, end]
        ids = ids[:, kept_positions]
    return ids[0] if position_axes == 1 else ids


def unpruned_ids(
    unpruned_length: int, spans: Sequence[VisualSpan], *, position_axes: int
) -> Int64Array:
    """Ids of a prompt of which nothing is pruned.

    With three axes they are those of Qwen2-VL's M-RoPE (arXiv 2409.12191) and its successors': a
    text token has one id on all axes. The tokens of an image have, on the axes of time, row and
    column, (s, s + row, s + column), where s is the id that a text token would have there; and
    text goes on at s + max(rows, columns).

    Args:
        unpruned_length: L.
        spans: The images, in prompt order, text behind the last.
        position_axes: A, 1 or 3.

    Returns:
        int64 [A, L].

    Raises:
        UsageError: another number of axes, or several and an image without a grid.
    """
    if position_axes not in (1, 3):
        raise UsageError("no such number of position axes", seen=position_axes, allowed="1 or 3")
    # What a text token of each index would have, were the images before it as long as their ids.
    ids = np.tile(np.arange(unpruned_length, dtype=np.int64), (position_axes, 1))
    for span in spans:
        end = span.start + span.num_visual_tokens
        num_ids = num_image_ids(span.num_visual_tokens, span.grid, position_axes=position_axes)
        if position_axes == 3:
            assert span.grid is not None
            rows, cols = np.divmod(np.arange(span.num_visual_tokens), span.grid[1])
            ids[:, span.start : end] = ids[0, span.start] + np.stack(
                [np.zeros_like(rows), rows, cols]
            )
        ids[:, end:] += num_ids - span.num_visual_tokens
    return ids


def num_image_ids(
    num_visual_tokens: int, grid: tuple[int, int] | None, *, position_axes: int
) -> int:
    """How many ids an image takes up: N with one axis, max(rows, columns) with three.

    Raises:
        UsageError: there are three axes, and no grid of N tokens.
    """
    if position_axes == 1:
        return num_visual_tokens
    if grid is None or grid[0] * grid[1] != num_visual_tokens:
        raise UsageError(
            "an image has no grid to take its position ids from",
            seen=f"{num_visual_tokens} visual tokens, grid {grid}",
            allowed="rows x columns of all visual tokens, with three position axes",
        )
    return max(grid)


def compact_positions(length: int) -> Int64Array:
    """The slots of a sequence, int64 [P]: 0, 1, 2, ..."""
    return np.arange(length, dtype=np.int64)


def stack_tables(rows: Sequence[Int64Array]) -> Int64Array:
    """Stack tables of different length, [P] into [B, P] or [A, P] into [A, B, P].

    A shorter row is continued on the right by last+1, last+2, ...: exactly what
    :func:`gap_remap` computes past a table's end, so padding changes nothing.

    Raises:
        UsageError: there are no rows, one is empty, or they differ in their axes.
    """
    if not rows or any(not row.size or row.ndim not in (1, 2) for row in rows):
        raise UsageError("position tables must be non-empty, one a row", seen=len(rows))
    if len({row.shape[:-1] for row in rows}) != 1:
        raise UsageError("position tables differ in their axes", seen=[r.shape for r in rows])
    length = max(row.shape[-1] for row in rows)
    return np.stack([continue_table(row, length) for row in rows], axis=-2)


def continue_table(table: Int64Array, length: int) -> Int64Array:
    """A table [..., P], continued to [..., length] as :func:`gap_remap` itself continues it."""
    missing = max(0, length - table.shape[-1])
    more = table[..., -1:] + 1 + np.arange(missing, dtype=np.int64)
    return np.concatenate([table, more], axis=-1)


def slots_from_mask(attention_mask: NDArray[Any]) -> Int64Array:
    """Slots of a left-padded batch: cumsum(mask != 0) - 1, never negative.

    Args:
        attention_mask: [B, T], not 0 for a token, 0 for padding on the left.

    Returns:
        int64 [B, T]; padding gets slot 0, the first real token of a row slot 0, then 1, 2, ...
    """
    slots = np.cumsum(attention_mask != 0, axis=1, dtype=np.int64) - 1
    return np.maximum(slots, 0)


def gap_remap(position_ids: Int64Array, id_table: Int64Array) -> Int64Array:
    """Original ids of slots; the maths of the ``GapRemap`` node.

    The rule is the same on each axis, since a prompt ends with text, whose id is equal on all axes
    and the largest.

    Args:
        position_ids: int64 [B, S], slots 0, 1, 2, ... over the pruned sequence.
        id_table: int64 [B, P], or [A, B, P], from :func:`build_id_table`.

    Returns:
        int64 [B, S], or [A, B, S]: ``table[slot]`` for slot < P, then
        ``table[P-1] + 1 + (slot - P)``, that is
        ``table[min(slot, P-1)] + slot - min(slot, P-1)``: decode continues from the unpruned ids.

    Raises:
        UsageError: the arrays are not of these shapes with one B, P is 0, or a slot is negative.
    """
    if position_ids.ndim != 2 or id_table.ndim not in (2, 3):
        raise UsageError(
            "GapRemap takes a matrix of slots and a table of ids",
            seen=f"position_ids {list(position_ids.shape)}, id table {list(id_table.shape)}",
            allowed="[B, S], and [B, P] or [A, B, P]",
        )
    if position_ids.shape[0] != id_table.shape[-2] or id_table.shape[-1] == 0:
        raise UsageError(
            "the table of ids does not fit position_ids",
            seen=f"{list(id_table.shape)} and {list(position_ids.shape)}",
            allowed="[B, S], and [B, P] or [A, B, P], with the same B and P >= 1",
        )
    if position_ids.size and int(position_ids.min()) < 0:
        raise UsageError("slots are never negative", seen=int(position_ids.min()), allowed=">= 0")
    within = np.minimum(position_ids, id_table.shape[-1] - 1)
    places = np.broadcast_to(within, (*id_table.shape[:-2], *within.shape))
    original: Int64Array = np.take_along_axis(id_table, places, axis=-1) + (position_ids - within)
    return original
