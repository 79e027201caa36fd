"""GAP in plain numpy: which position id each surviving token keeps.

Grounding-Aware Token Pruning (arXiv 2506.21873) gives every surviving token the position id it had
*before* pruning. Everything here is a matter of one table, ``kept_positions``:
entry ``p`` is the index, in the unpruned sequence, of the prompt token that is fed ``p``-th.

Runtimes feed *slots* 0, 1, 2, ... over the pruned sequence; :func:`gap_remap` turns slots into
original ids, during prefill and, past the table's end, during decode. The ``GapRemap`` graph node
computes the same.

A picture cut into tiles is one image like any other once :func:`arrange_tiles` has put the tokens
of its tiles in order.

Shape letters: B rows, S fed tokens, P prompt tokens after pruning, N visual tokens before pruning,
K kept visual tokens, L prompt tokens before pruning, I tiles of one picture, M tokens of a tiled
picture after pruning.
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
TileCode = Literal["transformers", "authors"]


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


@dataclass(frozen=True, kw_only=True)
class TileLayout:
    """Where the tiles of one picture lie in its visual sequence ("anyres", LLaVA-1.6).

    Unpruned, the sequence is: the base tile's tokens, which show the whole picture; then, row by
    row, those of all other tiles joined to one grid, each row followed by one newline token. Rows
    and columns of the joined grid that show nothing but padding are no part of it.

    Attributes:
        rows: Of one tile's tokens.
        cols: Of one tile's tokens.
        tile_rows: Tiles below each other, the base tile not counted.
        tile_cols: Tiles beside each other.
        first_row: Of the joined grid, the first that shows the picture.
        first_col: Of the joined grid, the first that shows the picture.
        num_rows: How many rows show the picture; none where it is extremely wide.
        num_cols: How many columns show the picture; none where it is extremely tall.
    """

    rows: int
    cols: int
    tile_rows: int
    tile_cols: int
    first_row: int
    first_col: int
    num_rows: int
    num_cols: int

    @classmethod
    def of_picture(
        cls,
        width: int,
        height: int,
        *,
        rows: int,
        cols: int,
        tile_rows: int,
        tile_cols: int,
        follows: TileCode = "transformers",
    ) -> TileLayout:
        """Layout of a picture that is fitted, aspect kept and centred, to a canvas of tiles.

        The size of what is no padding is a product of floats, whose whole part counts. Both
        ``unpad_image`` have it so; transformers rounds to seven digits first, where LLaVA's own
        code takes 23.999999999999996 for 23, and drops one more line on either side.

        Args:
            width: Of the picture, in pixels.
            height: Of the picture, in pixels.
            rows: Of one tile's tokens.
            cols: Of one tile's tokens.
            tile_rows: Of the canvas.
            tile_cols: Of the canvas.
            follows: Whose code is followed.

        Raises:
            UsageError: a size below 1.
        """
        if min(width, height, rows, cols, tile_rows, tile_cols) < 1:
            raise UsageError(
                "a tiled picture needs pixels, tokens and tiles",
                seen=f"{width}x{height} pixels, {rows}x{cols} tokens, "
                f"{tile_rows}x{tile_cols} tiles",
                allowed="1 or more of each",
            )
        all_rows, all_cols = tile_rows * rows, tile_cols * cols
        first_row = first_col = 0
        shown = int if follows == "authors" else _whole_part
        if width / height > all_cols / all_rows:
            first_row = (all_rows - shown(height * (all_cols / width))) // 2
        else:
            first_col = (all_cols - shown(width * (all_rows / height))) // 2
        return cls(
            rows=rows,
            cols=cols,
            tile_rows=tile_rows,
            tile_cols=tile_cols,
            first_row=first_row,
            first_col=first_col,
            num_rows=all_rows - 2 * first_row,
            num_cols=all_cols - 2 * first_col,
        )

    @property
    def num_tiles(self) -> int:
        """I, the base tile included."""
        return 1 + self.tile_rows * self.tile_cols

    @property
    def num_visual_tokens(self) -> int:
        """Length of the unpruned visual sequence, newlines included."""
        return self.rows * self.cols + self.num_rows * (self.num_cols + 1)


def _whole_part(number: float) -> int:
    """Of a number that is meant to be whole where it is that to seven digits."""
    return int(round(number, 7))


@dataclass(frozen=True, kw_only=True)
class TileTokens:
    """Token account of one picture or tile.

    Attributes:
        num_visual_tokens: N, what the vision encoder makes of it.
        num_kept_tokens: K, what the pruner left.
        num_padding_tokens: How many of those show nothing but padding, and so are dropped as well.
        num_newline_tokens: How many rows of the joined grid end in this tile, each with a newline.
    """

    num_visual_tokens: int
    num_kept_tokens: int
    num_padding_tokens: int = 0
    num_newline_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class TiledTokens:
    """The visual tokens of a tiled picture as they are fed.

    Attributes:
        source: int64 [M], what each token is: tile * K + k, or -1 for a newline.
        keep_indices: int64 [M], ascending: its index in the unpruned visual sequence.
        num_visual_tokens: Length of that sequence.
        tiles: The account, base tile first, then row by row.
    """

    source: Int64Array
    keep_indices: Int64Array
    num_visual_tokens: int
    tiles: tuple[TileTokens, ...]


def arrange_tiles(keep_indices: Int64Array, layout: TileLayout) -> TiledTokens:
    """Put what pruning left of each tile in the order of the picture's visual sequence.

    Kept tokens that show nothing but padding are dropped; newlines are all kept, with their own
    ids, since the model reads the rows by them.

    Args:
        keep_indices: int64 [I, K], for each tile, base first and then row by row, the ascending
            indices 0..N-1 of its kept tokens.
        layout: Of the picture.

    Raises:
        UsageError: not one row a tile, or a row that is not ascending within 0..N-1.
    """
    keep = np.asarray(keep_indices, dtype=np.int64)
    _check_tile_indices(keep, layout)
    per_tile = layout.rows * layout.cols
    # The base tile comes out as -1 and is mended below.
    tile = np.arange(layout.num_tiles, dtype=np.int64)[:, None] - 1
    row = tile // layout.tile_cols * layout.rows + keep // layout.cols - layout.first_row
    col = tile % layout.tile_cols * layout.cols + keep % layout.cols - layout.first_col
    visible = (row >= 0) & (row < layout.num_rows) & (col >= 0) & (col < layout.num_cols)
    index = per_tile + row * (layout.num_cols + 1) + col
    visible[0], index[0] = True, keep[0]

    joined_rows = np.arange(layout.num_rows, dtype=np.int64)
    newlines = per_tile + joined_rows * (layout.num_cols + 1) + layout.num_cols
    found = np.concatenate([index[visible], newlines])
    source = np.concatenate([np.flatnonzero(visible), np.full_like(newlines, -1)])
    order = np.argsort(found)
    # A row ends in the last tile of its row of tiles.
    ends = 1 + (layout.first_row + joined_rows) // layout.rows * layout.tile_cols
    ends += layout.tile_cols - 1
    num_newlines = np.bincount(ends, minlength=layout.num_tiles)
    return TiledTokens(
        source=source[order],
        keep_indices=found[order],
        num_visual_tokens=layout.num_visual_tokens,
        tiles=tuple(
            TileTokens(
                num_visual_tokens=per_tile,
                num_kept_tokens=keep.shape[1],
                num_padding_tokens=int((~visible[number]).sum()),
                num_newline_tokens=int(num_newlines[number]),
            )
            for number in range(layout.num_tiles)
        ),
    )


def _check_tile_indices(keep: Int64Array, layout: TileLayout) -> None:
    if keep.ndim != 2 or keep.shape[0] != layout.num_tiles or keep.shape[1] < 1:
        raise UsageError(
            "keep_indices of a tiled picture must be one row a tile",
            seen=f"shape {list(keep.shape)}",
            allowed=f"[{layout.num_tiles}, K], base tile first",
        )
    last = layout.rows * layout.cols - 1
    if keep.min() < 0 or keep.max() > last:
        raise UsageError(
            "keep_indices out of range", seen=f"{keep.min()}..{keep.max()}", allowed=f"0..{last}"
        )
    if (np.diff(keep, axis=1) <= 0).any():
        raise UsageError(
            "the kept tokens of a tile are not in raster order",
            allowed="ascending indices; only raster order joins tiles",
        )
