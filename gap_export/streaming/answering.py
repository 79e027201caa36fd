"""Frames in, answers out: the loop that a command, a bag and a robot share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gap_export.errors import ImageError, UsageError
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.image_view import PreparedImage
from gap_export.runtime.images.image import ImageFrame, ImageInput, read_image
from gap_export.runtime.session import GroundingSession
from gap_export.streaming.same_frame import sameness, summarize
from gap_export.streaming.sources import SourceFrame


@dataclass(frozen=True, kw_only=True)
class FrameAnswer:
    """What became of a frame: answered, skipped, or neither since it could not be used.

    Attributes:
        frame: The frame.
        groundings: Of each expression, in their order; of a skipped frame those of the frame it
            is the same as; none where it could not be used.
        same_as: Index of the frame that a skipped one is the same as; else None.
        sameness: With the frame that was answered last, see ``streaming.same_frame``; None
            where frames are not compared, for the first one, and after a change of size.
        error: Why the frame could not be used; else None.
        shown: The frame as displayed, RGB, where it was asked for.
    """

    frame: SourceFrame
    groundings: tuple[Grounding, ...] = ()
    same_as: int | None = None
    sameness: float | None = None
    error: str | None = None
    shown: Image.Image | None = None

    @property
    def outcome(self) -> Literal["answered", "skipped", "failed"]:
        """What became of it, in a word."""
        if self.error is not None:
            return "failed"
        return "answered" if self.same_as is None else "skipped"

    def to_plain(self) -> dict[str, Any]:
        """As JSON knows it; the groundings of a skipped frame stand in that frame's answer."""
        plain: dict[str, Any] = {"frame": self.frame.index, "source": self.frame.name}
        if self.frame.time_s is not None:
            plain["time_s"] = round(self.frame.time_s, 4)
        if self.frame.num_dropped:
            plain["dropped"] = self.frame.num_dropped
        if self.sameness is not None:
            plain["sameness"] = round(self.sameness, 4)
        if self.error is not None:
            plain["error"] = self.error
        elif self.same_as is not None:
            plain["skipped"] = f"shows what frame {self.same_as} showed"
            plain["same_as"] = self.same_as
        else:
            plain["groundings"] = [each.to_plain() for each in self.groundings]
        return plain


def answer_frames(
    session: GroundingSession,
    frames: Iterable[SourceFrame],
    expressions: Sequence[str],
    *,
    same_frame: float | None = None,
    allow_damaged: bool = False,
    image_frame: ImageFrame = "upright",
    shows: bool = False,
) -> Iterator[FrameAnswer]:
    """Ask about each frame, and say so where it was not asked.

    Args:
        session: Answers.
        frames: As they come.
        expressions: What to look for in each.
        same_frame: Skip a frame whose sameness with the last one that was answered is at least
            this, in (0, 1].
        allow_damaged: Use what can be decoded of damaged images.
        image_frame: See ``GroundingSession.ground``.
        shows: Keep each frame as displayed in its answer.

    Raises:
        UsageError: ``same_frame`` is no such number.
        ExpressionError: there are no expressions, or one cannot be used.
    """
    check_same_frame(same_frame)
    last: _Answered | None = None
    for frame in frames:
        if frame.image is None:
            yield FrameAnswer(frame=frame, error=frame.error)
            continue
        try:
            image: ImageInput | PreparedImage = frame.image
            loaded = shown = None
            if same_frame is not None or shows:
                loaded = read_image(
                    frame.image,
                    pad_color=session.manifest.image.pad_color,
                    frame=image_frame,
                    allow_damaged=allow_damaged,
                )
                shown = loaded.image
            alike = None if last is None or shown is None else last.sameness(shown)
            if last and alike is not None and same_frame is not None and alike >= same_frame:
                yield last.skipped(frame, alike, shown if shows else None)
                continue
            if loaded is not None:
                # It is decoded already.
                image = PreparedImage.of(loaded, session.manifest)
            groundings = session.ground_batch(
                image, expressions, frame=image_frame, allow_damaged=allow_damaged
            )
        except ImageError as err:
            yield FrameAnswer(frame=frame, error=str(err))
            continue
        answer = FrameAnswer(
            frame=frame,
            groundings=tuple(groundings),
            sameness=None if same_frame is None else alike,
            shown=shown if shows else None,
        )
        last = _Answered.of(answer, None if same_frame is None else shown)
        yield answer


def check_same_frame(share: float | None) -> None:
    """Refuse a sameness that is none.

    Raises:
        UsageError: it is.
    """
    if share is not None and not 0.0 < share <= 1.0:
        raise UsageError("--same-frame is no share", seen=share, allowed="more than 0, at most 1")


@dataclass(frozen=True)
class _Answered:
    """The last answer, and a summary of its frame where frames are compared."""

    answer: FrameAnswer
    size: tuple[int, int] | None
    cells: NDArray[np.uint8] | None

    @classmethod
    def of(cls, answer: FrameAnswer, shown: Image.Image | None) -> _Answered:
        if shown is None:
            return cls(answer, None, None)
        return cls(answer, shown.size, summarize(shown))

    def sameness(self, shown: Image.Image) -> float | None:
        if self.cells is None or self.size != shown.size:
            return None
        return sameness(self.cells, summarize(shown))

    def skipped(self, frame: SourceFrame, alike: float, shown: Image.Image | None) -> FrameAnswer:
        return FrameAnswer(
            frame=frame,
            groundings=self.answer.groundings,
            same_as=self.answer.frame.index,
            sameness=alike,
            shown=shown,
        )
