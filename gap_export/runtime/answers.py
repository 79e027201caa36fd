"""What an answer says: the box in pixels of the image, and what is odd about it."""

from __future__ import annotations

from collections.abc import Sequence

from gap_export.runtime.boxes import parse_answer, to_pixels
from gap_export.runtime.images.geometry import Box, ImageGeometry
from gap_export.spec.manifest import BoxSpec, Manifest

# By how much of the scale a coordinate may lie beyond its ends: a model that rounds, or is a little
# off at an edge, stays within; pixels, percent and thousandths do not.
SCALE_TOLERANCE = 0.05
# A box all of whose coordinates are at most 1 on a scale of at least this is a box in 0..1.
_NO_FRACTIONS = 100.0


def read_answer(
    text: str, token_ids: Sequence[int], manifest: Manifest, geometry: ImageGeometry
) -> tuple[Box | None, tuple[str, ...]]:
    """An answer's box in pixels, and warnings; where there is no box, one of them says why."""
    spec, warnings = manifest.box, []
    box = None
    parsed = parse_answer(text, spec)
    if parsed is None:
        warnings.append(f"the answer holds no box: {text!r}")
    else:
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
        elif not parsed.exact:
            warnings.append(
                f"the box is not written as the model should, and was read with tolerance: {text!r}"
            )
    if not has_ended(token_ids, manifest):
        limit = manifest.prompt.max_new_tokens
        warnings.append(f"the answer was cut off after {limit} tokens, before it ended: {text!r}")
    return box, tuple(warnings)


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
