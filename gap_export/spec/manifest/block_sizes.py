"""How many INT4 weights may share a scale; known before torch is there to make them."""

from __future__ import annotations

from gap_export.errors import UsageError

BLOCK_SIZES = (32, 64, 128)


def check_block_size(block_size: int) -> None:
    """Refuse a number of weights that no export holds with one scale.

    Raises:
        UsageError: it is not one of BLOCK_SIZES.
    """
    if block_size not in BLOCK_SIZES:
        raise UsageError(
            "no such block size of INT4 weights",
            seen=block_size,
            allowed=", ".join(map(str, BLOCK_SIZES)),
        )
