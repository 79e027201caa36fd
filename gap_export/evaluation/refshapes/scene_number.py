"""What numbers a drawn scene, in RefShapes and in RefShapes-2 alike."""

from __future__ import annotations

from typing import Literal, get_args

Split = Literal["train", "heldout"]

MIN_EXPRESSIONS = 4
"""A scene about which less can be asked is drawn again."""
EXPRESSIONS_PER_IMAGE = 4
"""Questions about one image in a data set, at most."""


def check_number(split: str, seed: int, index: int, num_expressions: int) -> None:
    """Refuse what numbers no scene.

    Raises:
        ValueError: an argument is out of range.
    """
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; use one of {', '.join(get_args(Split))}")
    if min(seed, index) < 0 or num_expressions < 1:
        raise ValueError(
            f"seed={seed}, index={index}, num_expressions={num_expressions}: "
            "seed and index must be 0 or more, num_expressions 1 or more"
        )
