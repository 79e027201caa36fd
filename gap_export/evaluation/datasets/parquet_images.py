"""Images out of parquet files, a row group at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gap_export.errors import ImageError, UsageError
from gap_export.extras import require_extra

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

IMAGE = "image"


def read_image(file: Path, row: int) -> bytes:
    """The encoded image of a row.

    The row group it is in is kept until another is read: rows in their order read each one once.

    Args:
        file: Of parquet, with a column ``image`` of ``{bytes, path}``.
        row: From 0.

    Raises:
        ImageError: the file, the row or the image is not there, or cannot be read.
        MissingDependencyError: pyarrow is not installed.
    """
    require_extra("refcoco", "reading parquet files")
    try:
        with reading(file):
            sizes = _group_sizes(file)
            ends = list(accumulate(sizes))
            group = bisect_right(ends, row)
            if group == len(sizes):
                raise IndexError(f"row {row} of {sum(sizes)}")
            encoded = _images(file, group)[row - ends[group] + sizes[group]].as_py()
    except UsageError as err:
        raise ImageError(err.what, seen=err.seen) from err
    if not isinstance(encoded, bytes):
        raise ImageError("the row holds no image", seen=f"{file}, row {row}")
    return encoded


@contextmanager
def reading(file: Path) -> Iterator[None]:
    """Turn what pyarrow raises into ours.

    Raises:
        UsageError: the file is damaged, or cannot be read.
    """
    from pyarrow import ArrowException

    try:
        yield
    # An ArrowException may also be a ValueError; a missing file is an OSError.
    except (ArrowException, OSError, ValueError, KeyError, IndexError) as err:
        lines = str(err).splitlines() or [type(err).__name__]
        raise UsageError(
            "not a parquet file that can be read", seen=f"{file}: {lines[0][:300]}"
        ) from err


def open_parquet(file: Path) -> ParquetFile:
    """Open a file, to be closed as a context manager."""
    from pyarrow.parquet import ParquetFile

    return ParquetFile(file)


def has_images(opened: ParquetFile) -> bool:
    """Whether the column ``image``, which is there, holds bytes by that name."""
    from pyarrow.types import is_binary, is_struct

    kind = opened.schema_arrow.field(IMAGE).type
    return is_struct(kind) and any(
        field.name == "bytes" and is_binary(field.type) for field in kind
    )


@lru_cache(maxsize=64)
def _group_sizes(file: Path) -> tuple[int, ...]:
    with open_parquet(file) as opened:
        metadata = opened.metadata
        return tuple(metadata.row_group(n).num_rows for n in range(metadata.num_row_groups))


@lru_cache(maxsize=1)
def _images(file: Path, group: int) -> Any:
    """The encoded images of a row group, a pyarrow array of bytes."""
    with open_parquet(file) as opened:
        column = opened.read_row_group(group, columns=[f"{IMAGE}.bytes"]).column(IMAGE)
    return column.combine_chunks().field("bytes")
