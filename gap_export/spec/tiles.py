"""Images that are cut into tiles: the order of their visual tokens, and which of them are padding.

The tiles of one image are joined to rows (:class:`TileLayout`) or follow each other
(:class:`TileStack`). Once their tokens are put in order, a tiled image is to ``spec.positions`` an
image like any other.

Shape letters: N visual tokens of one tile before pruning, K kept of each, I tiles of one image,
M tokens of a tiled image after pruning.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gap_export.errors import UsageError
from gap_export.spec.manifest.facts import TileCode
from gap_export.spec.positions import Int64Array


@dataclass(frozen=True, kw_only=True)
class TileLayout:
    """Where the tiles of one image lie in its visual sequence ("anyres", LLaVA-1.6).

    Unpruned, the sequence is: the base tile's tokens, which show the whole image; then, row by
    row, those of all other tiles joined to one grid, each row followed by one newline token. Rows
    and columns of the joined grid that show nothing but padding are no part of it.

    Attributes:
        rows: Rows of tokens in one tile.
        cols: Columns of tokens in one tile.
        tile_rows: Tiles below each other, the base tile not counted.
        tile_cols: Tiles beside each other.
        first_row: The first row of the joined grid that shows the image.
        first_col: The first column of the joined grid that shows the image.
        num_rows: How many rows show the image; none where it is extremely wide.
        num_cols: How many columns show the image; none where it is extremely tall.
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
    def for_image(
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
        """Lay out an image that is fitted to a canvas of tiles, aspect kept and centered.

        The size of what is not padding is the whole part of a product of floats. Both
        ``unpad_image`` compute it so; transformers rounds to seven digits first, where LLaVA's own
        code takes 23.999999999999996 for 23, and drops one more line on either side.

        Args:
            width: Pixels of the image.
            height: Pixels of the image.
            rows: Rows of tokens in one tile.
            cols: Columns of tokens in one tile.
            tile_rows: Rows of tiles on the canvas.
            tile_cols: Columns of tiles on the canvas.
            follows: Whose code decides what is padding.

        Raises:
            UsageError: a size below 1.
        """
        if min(width, height, rows, cols, tile_rows, tile_cols) < 1:
            raise UsageError(
                "a tiled image needs pixels, tokens and tiles",
                seen=f"{width}x{height} pixels, {rows}x{cols} tokens, "
                f"{tile_rows}x{tile_cols} tiles",
                allowed="1 or more of each",
            )
        all_rows, all_cols = tile_rows * rows, tile_cols * cols
        first_row = first_col = 0

        def shown(lines: float) -> int:
            return int(lines if follows == "authors" else round(lines, 7))

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


@dataclass(frozen=True, kw_only=True)
class TileStack:
    """Tiles whose tokens follow each other, tile after tile ("dynamic tiles", InternVL).

    Unpruned, the sequence is: the tokens of each tile in raster order, tiles row by row; then those
    of the thumbnail, which shows the whole image. Nothing stands between tiles: which one a token
    belongs to is in its position alone.

    Attributes:
        rows: Rows of tokens in one tile.
        cols: Columns of tokens in one tile.
        tile_rows: Tiles below each other, the thumbnail not counted.
        tile_cols: Tiles beside each other.
    """

    rows: int
    cols: int
    tile_rows: int
    tile_cols: int

    @property
    def num_tiles(self) -> int:
        """I, the thumbnail included."""
        return self.tile_rows * self.tile_cols + 1

    @property
    def num_visual_tokens(self) -> int:
        """Length of the unpruned visual sequence."""
        return self.num_tiles * self.rows * self.cols


@dataclass(frozen=True, kw_only=True)
class TileTokens:
    """The token counts of one image or tile.

    Attributes:
        num_visual_tokens: N.
        num_kept_tokens: K, what the pruner left.
        num_padding_tokens: How many of the kept ones show nothing but padding and are dropped too.
        num_newline_tokens: How many rows of the joined grid end in this tile, each with a newline.
    """

    num_visual_tokens: int
    num_kept_tokens: int
    num_padding_tokens: int = 0
    num_newline_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class TiledTokens:
    """The visual tokens of a tiled image as they are fed.

    Attributes:
        source: int64 [M], what each token is: tile * K + k, or -1 for a newline.
        keep_indices: int64 [M], ascending: its index in the unpruned visual sequence.
        num_visual_tokens: Length of the unpruned visual sequence.
        tiles: The counts of each tile, in the order of the vision encoder's inputs.
    """

    source: Int64Array
    keep_indices: Int64Array
    num_visual_tokens: int
    tiles: tuple[TileTokens, ...]


def arrange_tiles(keep_indices: Int64Array, layout: TileLayout) -> TiledTokens:
    """Put what pruning left of each tile in the order of the image's visual sequence.

    Kept tokens that show nothing but padding are dropped; newlines are all kept, with their own
    ids, since the model reads the rows by them.

    Args:
        keep_indices: int64 [I, K], for each tile, base first and then row by row, the ascending
            indices 0..N-1 of its kept tokens.
        layout: Where the tiles lie.

    Raises:
        UsageError: there is not one row a tile, or a row does not ascend within 0..N-1.
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


def stack_tiles(keep_indices: Int64Array, stack: TileStack) -> TiledTokens:
    """Put what pruning left of each tile behind what it left of the one before.

    Args:
        keep_indices: int64 [I, K], for each tile, row by row and the thumbnail last, the ascending
            indices 0..N-1 of its kept tokens.
        stack: How many tiles there are.

    Raises:
        UsageError: there is not one row a tile, or a row does not ascend within 0..N-1.
    """
    keep = np.asarray(keep_indices, dtype=np.int64)
    _check_tile_indices(keep, stack)
    per_tile = stack.rows * stack.cols
    first = np.arange(stack.num_tiles, dtype=np.int64)[:, None] * per_tile
    return TiledTokens(
        source=np.arange(keep.size, dtype=np.int64),
        keep_indices=(first + keep).reshape(-1),
        num_visual_tokens=stack.num_visual_tokens,
        tiles=(TileTokens(num_visual_tokens=per_tile, num_kept_tokens=keep.shape[1]),)
        * stack.num_tiles,
    )


def _check_tile_indices(keep: Int64Array, layout: TileLayout | TileStack) -> None:
    if keep.ndim != 2 or keep.shape[0] != layout.num_tiles or keep.shape[1] < 1:
        raise UsageError(
            "keep_indices of a tiled image must be one row a tile",
            seen=f"shape {list(keep.shape)}",
            allowed=f"[{layout.num_tiles}, K]",
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
