"""How the family prepares an image: the middle square, as its tower was trained on."""

from __future__ import annotations

from gap_export.runtime.images.geometry import Frame, ImageGeometry
from gap_export.runtime.images.preparations import Preparation, resize


class CenterCrop(Preparation):
    """The largest square in the middle; what lies beside it is not seen."""

    def views(self, image, spec, canvas):
        """One view: the square, resized."""
        del canvas
        seen = self.frame(ImageGeometry(width=image.width, height=image.height))
        box = (seen.left, seen.top, seen.left + seen.width, seen.top + seen.height)
        return [resize(image.crop(box), spec)]

    def frame(self, geometry):
        """Where the square is, so that kept tokens are drawn in their places."""
        side = min(geometry.width, geometry.height)
        left, top = (geometry.width - side) // 2, (geometry.height - side) // 2
        return Frame(left=left, top=top, width=side, height=side)


CENTER_CROP = CenterCrop()
