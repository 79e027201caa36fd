"""What a session answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from gap_export.runtime.images.geometry import Box, Frame
from gap_export.spec.manifest import ADDED_LATER
from gap_export.spec.tiles import TileTokens

if TYPE_CHECKING:
    from typing_extensions import Self

View = Literal["image", "base", "tiles"]


@dataclass(frozen=True, kw_only=True)
class TokenGrid:
    """Visual tokens that look at the image together.

    Attributes:
        view: ``image``: all there are; of an image cut into tiles ``base``: the whole of it at low
            resolution, though some models read it last, and ``tiles``: all its tiles joined,
            without their rows and columns of padding.
        rows: Rows of unpruned tokens.
        cols: Columns of unpruned tokens.
        frame: The part of the image that they cover.
        kept: Cells the model saw, 0..rows*cols-1 in raster order, in the order they were fed.
        tiles: The account of each tile, row by row; one entry for ``image`` and ``base``.
        scores: What the pruner ranked the cells by, in raster order; None where it has no scores,
            and for tiles. No part of the JSON form.
        stood_out: How many cells' scores stand out, where that decides how many are kept; at least
            one is, and at most the bundle's K. Else None.
    """

    view: View
    rows: int
    cols: int
    frame: Frame
    kept: tuple[int, ...]
    tiles: tuple[TileTokens, ...]
    scores: tuple[float, ...] | None = None
    stood_out: int | None = field(default=None, metadata=ADDED_LATER)

    @property
    def is_whole(self) -> bool:
        """Whether nothing was dropped."""
        return len(self.kept) == self.rows * self.cols

    def to_plain(self) -> dict[str, Any]:
        """As JSON knows it; the frame to a hundredth of a pixel."""
        frame = (self.frame.left, self.frame.top, self.frame.width, self.frame.height)
        return {
            "view": self.view,
            "rows": self.rows,
            "cols": self.cols,
            "frame": [round(value, 2) for value in frame],
            "kept": list(self.kept),
            "stood_out": self.stood_out,
            "tiles": [asdict(tile) for tile in self.tiles],
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_plain`; what JSON does not hold is None."""
        values = {one.name: _frozen(plain.get(one.name)) for one in fields(cls)}
        left, top, width, height = plain["frame"]
        values["frame"] = Frame(left=left, top=top, width=width, height=height)
        values["tiles"] = tuple(TileTokens(**tile) for tile in plain["tiles"])
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ScoredBox:
    """One box of an answer.

    Attributes:
        box: As ``Grounding.box``.
        score: As ``Grounding.score``, of this box's tokens.
        found: As ``Grounding.found``.
    """

    box: Box
    score: float | None
    found: bool | None

    def to_plain(self) -> dict[str, Any]:
        """As JSON knows it."""
        return {"box": plain_box(self.box), "score": plain_score(self.score), "found": self.found}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_plain`."""
        return cls(**{one.name: _frozen(plain[one.name]) for one in fields(cls)})


@dataclass(frozen=True, kw_only=True)
class Grounding:
    """Where in an image an expression's object is.

    Attributes:
        expression: What was asked.
        box: (x1, y1, x2, y2) in pixels of the image as displayed, or as stored where the frame
            ``raw`` was asked for; None where the answer holds no box, or one without area.
        score: Probability in 0..1 that the model gave to the box as it is written: the product of
            the probabilities of the answer's tokens from the first to the last with a character of
            the box, each given all before it; where a box was read with tolerance, of all tokens of
            the answer. None where ``box`` is.
        found: Whether the object is there, by the threshold that ``gap-export calibrate`` found for
            the bundle; then False where ``box`` is None. None without a calibration.
        boxes: All boxes of the answer, in its order and at most as many as were asked for; the
            first is ``box``. Empty where that is None.
        text: The model's answer.
        token_ids: Its tokens, the one that ended it included.
        keep_indices: Index in the unpruned visual sequence of each visual token that the model saw;
            of an image cut into tiles newlines are part of both.
        num_visual_tokens: Length of the unpruned visual sequence.
        tokens: The same by what the tokens look at: one grid, or two of an image cut into tiles.
        image_size: Width and height in pixels, as displayed (or stored, as the box).
        orientation: The EXIF orientation that the image carries, 1..8; 1 where it carries none.
        timings_ms: Milliseconds by stage, only those that ran, and ``total``; answers of one batch
            share them.
        backend: What ran the model, with its version and device.
        warnings: What the user should know: words that the tokenizer does not know; an answer that
            was cut off, holds no box, is read with tolerance, or is out of the model's scale.
    """

    expression: str
    box: Box | None
    text: str
    token_ids: tuple[int, ...]
    keep_indices: tuple[int, ...]
    num_visual_tokens: int
    tokens: tuple[TokenGrid, ...]
    image_size: tuple[int, int]
    timings_ms: Mapping[str, float]
    backend: str
    warnings: tuple[str, ...]
    orientation: int = 1
    score: float | None = None
    found: bool | None = None
    boxes: tuple[ScoredBox, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        """As JSON knows it; the box to a hundredth of a pixel."""
        return {
            "expression": self.expression,
            "box": plain_box(self.box),
            "score": plain_score(self.score),
            "found": self.found,
            "boxes": [one.to_plain() for one in self.boxes],
            "text": self.text,
            "token_ids": list(self.token_ids),
            "keep_indices": list(self.keep_indices),
            "num_visual_tokens": self.num_visual_tokens,
            "tokens": [grid.to_plain() for grid in self.tokens],
            "image_size": list(self.image_size),
            "orientation": self.orientation,
            "timings_ms": dict(self.timings_ms),
            "backend": self.backend,
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_plain`; what JSON does not hold is None."""
        values = {one.name: _frozen(plain.get(one.name)) for one in fields(cls)}
        values["tokens"] = tuple(TokenGrid.from_plain(grid) for grid in plain["tokens"])
        values["boxes"] = tuple(ScoredBox.from_plain(one) for one in plain.get("boxes", ()))
        return cls(**values)


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def plain_box(box: Box | None) -> list[float] | None:
    """A box as JSON knows it: to a hundredth of a pixel."""
    return None if box is None else [round(value, 2) for value in box]


def plain_score(score: float | None) -> float | None:
    """A score as JSON knows it: six significant digits, since small ones differ too."""
    return None if score is None else float(f"{score:.6g}")
