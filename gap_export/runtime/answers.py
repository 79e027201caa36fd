"""What an answer says: the box in pixels of the image, and what is odd about it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gap_export.runtime.boxes import parse_boxes, to_pixels
from gap_export.runtime.images.geometry import Box, ImageGeometry
from gap_export.spec.manifest import BoxSpec, Manifest

# By how much of the scale a coordinate may lie beyond its ends: a model that rounds, or is a little
# off at an edge, stays within; pixels, percent and thousandths do not.
SCALE_TOLERANCE = 0.05
# A box all of whose coordinates are at most 1 on a scale of at least this is a box in 0..1.
_NO_FRACTIONS = 100.0


@dataclass(frozen=True, kw_only=True)
class PlacedBox:
    """A box of an answer.

    Attributes:
        box: (x1, y1, x2, y2) in pixels of the image.
        span: Where in the text it is written; see ``ParsedBox``.
    """

    box: Box
    span: tuple[int, int]


def read_answer(
    text: str,
    token_ids: Sequence[int],
    manifest: Manifest,
    geometry: ImageGeometry,
    *,
    max_boxes: int = 1,
) -> tuple[list[PlacedBox], tuple[str, ...]]:
    """An answer's boxes, and warnings; where one is not usable, one of them says why.

    Args:
        text: What the model answered.
        token_ids: Its tokens, the one that ended it included.
        manifest: Of the model.
        geometry: Of the image that was asked about.
        max_boxes: How many boxes are read at most.
    """
    spec = manifest.box
    boxes: list[PlacedBox] = []
    warnings: list[str] = []
    all_parsed = parse_boxes(text, spec, most=max_boxes)
    if not all_parsed:
        warnings.append(f"the answer holds no box: {text!r}")
    for parsed in all_parsed:
        if is_out_of_scale(parsed.fractions, spec):
            warnings.append(
                "the box is out of scale, its coordinates should run from 0 "
                f"{spec.describe_ends()}: {text!r}"
            )
        box = to_pixels(parsed.fractions, spec, geometry)
        if box is None:
            x1, y1, x2, y2 = parsed.fractions
            what = "has no area" if x1 == x2 or y1 == y2 else "lies outside the image"
            warnings.append(f"the answer {what}: {text!r}")
            continue
        boxes.append(PlacedBox(box=box, span=parsed.span))
        if not parsed.exact:
            warnings.append(
                f"the box is not written as the model should, and was read with tolerance: {text!r}"
            )
    if not has_ended(token_ids, manifest):
        limit = manifest.prompt.max_new_tokens
        warnings.append(f"the answer was cut off after {limit} tokens, before it ended: {text!r}")
    return boxes, tuple(dict.fromkeys(warnings))


def box_tokens(
    token_ids: tuple[int, ...],
    span: tuple[int, int],
    decode: Callable[[tuple[int, ...]], str],
) -> slice:
    """Which tokens of an answer write a box: those from its first character to its last.

    Args:
        token_ids: Of the answer.
        span: Of the box in the answer's text, which neither begins nor ends with space.
        decode: Text of tokens, without space around it and without special tokens.
    """
    start, end = span
    # By how much of the text there is after so many tokens: special ones add none.
    counts = range(len(token_ids) + 1)

    def length(count: int) -> int:
        return len(decode(token_ids[:count]))

    first = bisect_right(counts, start, key=length) - 1
    return slice(first, bisect_left(counts, end, key=length))


def has_ended(token_ids: Sequence[int], manifest: Manifest) -> bool:
    """Whether an answer ended by itself, and was not cut off at ``max_new_tokens``."""
    return token_ids[-1] in manifest.decoder.eos_token_ids


def is_out_of_scale(fractions: Box, spec: BoxSpec) -> bool:
    """Whether a box is written on another scale than the model's.

    Either a coordinate is beyond the ends by more than ``SCALE_TOLERANCE``, or the scale is of
    whole numbers, 0..100 or more, and all of the box is in 0..1. Pixels of an image that is smaller
    than the scale, and x and y in another order, look like a box that is elsewhere.

    Args:
        fractions: Coordinates divided by the scale, as :func:`parse_answer` gives them.
        spec: The model's.
    """
    low, high = min(fractions), max(fractions)
    if low < -SCALE_TOLERANCE or high > 1 + SCALE_TOLERANCE:
        return True
    highest = max(fraction * end for fraction, end in zip(fractions, spec.ends * 2, strict=True))
    return min(spec.ends) >= _NO_FRACTIONS and 0 < highest <= 1
