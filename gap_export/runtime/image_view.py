"""One image, prepared once and asked many times."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import GapExportError
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.images.geometry import ImageGeometry
from gap_export.runtime.images.image import LoadedImage, prepare_image
from gap_export.runtime.images.preparations import tile_layout
from gap_export.spec.manifest import Manifest

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class PreparedImage:
    """An image as the vision encoder reads it.

    Attributes:
        orientation: Of the image that was loaded; see ``Grounding``.
        warnings: Of loading it.
        pixel_values: float32 [I, 3, height, width].
        geometry: Says how it was prepared.
        num_tiled_tokens: Visual tokens before pruning of an image cut into tiles; else None.
    """

    orientation: int
    warnings: tuple[str, ...]
    pixel_values: NDArray[np.float32]
    geometry: ImageGeometry
    num_tiled_tokens: int | None

    @classmethod
    def of(cls, loaded: LoadedImage, manifest: Manifest) -> PreparedImage:
        """Prepare a loaded image in its model's way."""
        pixel_values, geometry = prepare_image(loaded.image, manifest.image)
        layout = tile_layout(geometry, manifest.image, manifest.grid)
        return cls(
            orientation=loaded.orientation,
            warnings=loaded.warnings,
            pixel_values=pixel_values,
            geometry=geometry,
            num_tiled_tokens=None if layout is None else layout.num_visual_tokens,
        )

    @cached_property
    def key(self) -> tuple[object, ...]:
        """What tells it from other images: all that a model computes follows from it."""
        digest = hashlib.blake2b(np.ascontiguousarray(self.pixel_values).data).digest()
        return digest, self.pixel_values.shape, self.geometry


class ImageView:
    """Answers expressions about one image; a context manager, from ``GroundingSession.look``.

    The image is decoded and prepared once. What the model computes of it is computed for the first
    expression and kept in the session's store, so that the next ones, and those of other views of
    the same image, cost their own words and the answer. Where the pruner reads the text, other
    tokens are kept for each expression: then only what stands before the image is kept.

    Example:
        >>> import numpy as np
        >>> from gap_export import GroundingSession
        >>> image = np.zeros((96, 96, 3), np.uint8)
        >>> with GroundingSession.open("demo") as session, session.look(image) as view:
        ...     boxes = [view.ground(words).box for words in ("the red circle", "the star")]
        >>> len(boxes)
        2
    """

    def __init__(self, ask: Callable[[Sequence[str]], list[Grounding]]) -> None:
        """Keep what answers expressions about the image."""
        self._ask: Callable[[Sequence[str]], list[Grounding]] | None = ask

    def ground(self, expression: str) -> Grounding:
        """Find one object; as ``GroundingSession.ground``.

        Raises:
            ExpressionError: the expression cannot be used.
            GapExportError: the view or its session is closed.
        """
        return self.ground_batch([expression])[0]

    def ground_batch(self, expressions: Sequence[str]) -> list[Grounding]:
        """Find several objects together; as ``GroundingSession.ground_batch``.

        Raises:
            ExpressionError: there are no expressions, or one cannot be used.
            GapExportError: the view or its session is closed.
        """
        if self._ask is None:
            raise GapExportError("the view is closed", fix="look at the image again")
        return self._ask(expressions)

    def close(self) -> None:
        """Let go of the image; what the session keeps of it goes when its room is needed."""
        self._ask = None

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        self.close()
