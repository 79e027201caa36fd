"""From the answer's text to a box in pixels of the picture."""

from __future__ import annotations

import re

from gap_export.manifest import BoxSpec
from gap_export.runtime.geometry import Box, ImageGeometry

# Bounded digits: no number overflows a float, and matching stays linear.
_NUMBER = r"([+-]?(?:\d{1,9}(?:\.\d{0,9})?|\.\d{1,9}))"
_INTEGER = r"<\s*(\d{1,9})\s*>"
_SYNTAXES = {
    "bracketed": re.compile(r"\[\s*" + r"\s*,\s*".join([_NUMBER] * 4) + r"\s*\]", re.ASCII),
    "angled": re.compile(r"\{\s*" + r"\s*".join([_INTEGER] * 4) + r"\s*\}", re.ASCII),
}


def parse_box(text: str, spec: BoxSpec) -> Box | None:
    """Coordinates of the first box in a text, as fractions of their frame.

    Args:
        text: The model's answer.
        spec: Syntax and scale; in either syntax space between its parts does not count.

    Returns:
        Two corners in the order given, 0..1 where the model keeps to its frame; None without a box.
    """
    found = _SYNTAXES[spec.syntax].search(text)
    if found is None:
        return None
    x1, y1, x2, y2 = (float(number) / spec.scale for number in found.groups())
    return x1, y1, x2, y2


def to_pixels(box: Box, spec: BoxSpec, geometry: ImageGeometry) -> Box | None:
    """Place fractions of the answer's frame in the picture.

    Corners are put in order and clipped to the picture: for a padded square of side S
    x = fraction * S - (S - W) // 2, for the image itself x = fraction * W; y alike.

    Returns:
        x1 < x2 and y1 < y2 in pixels, within the picture; None where nothing of the box is.
    """
    frame = geometry.box_frame(spec)
    x1, x2 = sorted(
        _clip(frame.left + fraction * frame.width, geometry.width) for fraction in box[0::2]
    )
    y1, y2 = sorted(
        _clip(frame.top + fraction * frame.height, geometry.height) for fraction in box[1::2]
    )
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None


def _clip(value: float, upper: int) -> float:
    return min(max(value, 0.0), float(upper))
