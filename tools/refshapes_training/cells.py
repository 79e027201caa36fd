"""The cells that an image is seen in, patches or visual tokens: where they lie, in which order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, eq=False)
class Cells:
    """N cells.

    Attributes:
        grids: Rows and columns of one or several grids, each over the whole image.
        order: int64 [N]: which cell is first, second, ...; they are counted grid after grid, in
            each in raster order.
    """

    grids: tuple[tuple[int, int], ...]
    order: NDArray[np.int64]

    def rows_and_columns(self) -> NDArray[np.int64]:
        """Row and column of each cell; those of a second grid are numbered on. int64 [2, N]."""
        found, above, left = [], 0, 0
        for rows, cols in self.grids:
            row, col = np.divmod(np.arange(rows * cols), cols)
            found.append(np.stack([row + above, col + left]))
            above, left = above + rows, left + cols
        return np.concatenate(found, axis=1)[:, self.order]

    def corners(self) -> NDArray[np.float64]:
        """What each cell covers, (x1, y1, x2, y2) as fractions of the image; float64 [N, 4]."""
        found = []
        for rows, cols in self.grids:
            row, col = np.divmod(np.arange(rows * cols), cols)
            sides = (col / cols, row / rows, (col + 1) / cols, (row + 1) / rows)
            found.append(np.stack(sides, axis=1))
        return np.concatenate(found)[self.order]

    def centers(self) -> NDArray[np.float32]:
        """Center of each cell twice over, as (x, y, x, y) fractions; float32 [N, 4]."""
        corners = self.corners()
        middle = (corners[:, :2] + corners[:, 2:]) / 2
        return np.tile(middle, 2).astype(np.float32)

    @property
    def num_rows_and_columns(self) -> tuple[int, int]:
        """Of all grids."""
        return sum(rows for rows, _ in self.grids), sum(cols for _, cols in self.grids)


def whole_image(rows: int, cols: int) -> Cells:
    """One grid, in raster order."""
    return Cells(grids=((rows, cols),), order=np.arange(rows * cols))


def tiles_and_thumbnail(rows: int, cols: int, tile_rows: int, tile_cols: int) -> Cells:
    """Tiles of rows x cols cells one after the other, then the whole image in as many cells."""
    joined = np.arange(rows * tile_rows * cols * tile_cols)
    tiles = joined.reshape(tile_rows, rows, tile_cols, cols).transpose(0, 2, 1, 3).reshape(-1)
    thumbnail = joined.size + np.arange(rows * cols)
    grids = ((rows * tile_rows, cols * tile_cols), (rows, cols))
    return Cells(grids=grids, order=np.concatenate([tiles, thumbnail]))
