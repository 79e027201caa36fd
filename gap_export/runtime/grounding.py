"""What a session answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gap_export.runtime.geometry import Box, Frame


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """Where in a picture an expression's object is.

    Attributes:
        expression: What was asked.
        box: (x1, y1, x2, y2) in pixels of the picture as displayed; None where the answer holds
            no box, or one without area in the picture.
        text: The model's answer.
        token_ids: Its tokens, the one that ended it included.
        keep_indices: Index among the unpruned visual tokens of each one that the model saw.
        num_visual_tokens: N, visual tokens before pruning.
        grid: Rows and columns of the unpruned visual tokens, raster order.
        grid_frame: The part of the picture that the grid covers.
        image_size: Width and height as displayed, in pixels.
        timings_ms: Milliseconds by stage, only those that ran, and ``total``; answers of one batch
            share them.
        backend: What ran the model, with its version and device.
        warnings: What the user should know, e.g. words the tokenizer does not.
    """

    expression: str
    box: Box | None
    text: str
    token_ids: tuple[int, ...]
    keep_indices: tuple[int, ...]
    num_visual_tokens: int
    grid: tuple[int, int]
    grid_frame: Frame
    image_size: tuple[int, int]
    timings_ms: Mapping[str, float]
    backend: str
    warnings: tuple[str, ...]

    def to_plain(self) -> dict[str, Any]:
        """As JSON knows it; the box to a hundredth of a pixel."""
        frame = self.grid_frame
        return {
            "expression": self.expression,
            "box": None if self.box is None else [round(value, 2) for value in self.box],
            "text": self.text,
            "token_ids": list(self.token_ids),
            "keep_indices": list(self.keep_indices),
            "num_visual_tokens": self.num_visual_tokens,
            "grid": {
                "rows": self.grid[0],
                "cols": self.grid[1],
                "frame": [frame.left, frame.top, frame.width, frame.height],
            },
            "image_size": list(self.image_size),
            "timings_ms": dict(self.timings_ms),
            "backend": self.backend,
            "warnings": list(self.warnings),
        }
