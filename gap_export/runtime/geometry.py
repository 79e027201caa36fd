"""Frames: which rectangle of a picture a set of coordinates, or a grid, refers to."""

from __future__ import annotations

from dataclasses import dataclass

from gap_export.manifest import BoxSpec, ImageSpec

Box = tuple[float, float, float, float]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A rectangle in pixels of the picture; it may reach beyond the picture's edges.

    Attributes:
        left: x of its left edge, 0 at the picture's left edge.
        top: y of its upper edge.
        width: Pixels.
        height: Pixels.
    """

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class ImageGeometry:
    """Size of a picture as displayed (rotation by EXIF applied), in pixels."""

    width: int
    height: int

    def input_frame(self, spec: ImageSpec) -> Frame:
        """What the vision encoder's input, and so the grid of visual tokens, covers."""
        return self._padded_square() if spec.preparation == "pad" else self._whole()

    def box_frame(self, spec: BoxSpec) -> Frame:
        """What the answer's coordinates are relative to."""
        return self._padded_square() if spec.frame == "padded_square" else self._whole()

    def _whole(self) -> Frame:
        return Frame(left=0, top=0, width=self.width, height=self.height)

    def _padded_square(self) -> Frame:
        side = max(self.width, self.height)
        left, top = (side - self.width) // 2, (side - self.height) // 2
        return Frame(left=-left, top=-top, width=side, height=side)
