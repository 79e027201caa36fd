"""``ground`` with many frames or expressions: a line of JSON a frame."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gap_export.cli._terminal import Terminal
from gap_export.errors import UsageError
from gap_export.outputs import OutputRule
from gap_export.visible import visible

if TYPE_CHECKING:
    from PIL.Image import Image

    from gap_export.runtime.session import GroundingSession
    from gap_export.streaming import FrameAnswer, FrameSource, SourceFrame


@dataclass(frozen=True, kw_only=True)
class FrameOptions:
    """Which of many frames are asked about; None and False: as is the default.

    Attributes:
        every: The first of every N.
        newest: The newest one each time.
        same_frame: Not those that are that much the same.
    """

    every: int | None
    newest: bool
    same_frame: float | None

    def check(self, source: FrameSource | None) -> None:
        """Refuse what would have no meaning.

        Raises:
            UsageError: an option about frames with one image, the newest of a folder's frames, or
                no share.
        """
        given = {
            "--every": self.every is not None,
            "--newest": self.newest,
            "--same-frame": self.same_frame is not None,
        }
        flags = ", ".join(flag for flag, is_given in given.items() if is_given)
        if source is None and flags:
            raise UsageError(
                f"{flags} cannot be used here: SOURCE is one image",
                allowed="a folder, a pattern, a video, a camera or an address of rtsp://",
            )
        if self.newest and source is not None and not source.has_times:
            raise UsageError(
                "--newest cannot be used here: the frames of SOURCE have no times",
                seen=source.name,
                allowed="a video, a camera or an address of rtsp://",
            )
        if self.same_frame is not None:
            # Not at the top: one image needs nothing of it.
            from gap_export.streaming.answering import check_same_frame

            check_same_frame(self.same_frame)


@dataclass(frozen=True)
class SavedOutput:
    """The file that ``--save`` names, and the rule for it."""

    path: Path | None
    rule: OutputRule


def check_save(path: Path | None, rule: OutputRule, source: FrameSource | None) -> None:
    """Refuse a file for drawings before the work.

    Raises:
        UsageError: ``--force`` and no file.
        OutputError: it could not, or must not, be written.
    """
    if path is None:
        if rule.force:
            raise UsageError("--force cannot be used here: no file is to be written")
    elif source is None:
        from gap_export.runtime.drawing import check_drawing_path

        check_drawing_path(path, rule)
    else:
        from gap_export.extras import require_extra

        require_extra("stream", "writing a video")
        from gap_export.streaming.video import check_video_path

        check_video_path(path, rule)


def ground_frames(
    terminal: Terminal,
    session: GroundingSession,
    source: FrameSource | str,
    expressions: Sequence[str],
    options: FrameOptions,
    output: SavedOutput,
    *,
    allow_damaged: bool,
) -> None:
    """Answer frames as they come, and say at the end what became of them.

    Args:
        terminal: Takes a line a frame.
        session: Answers.
        source: Many frames, or the path of one image.
        expressions: What to look for in each.
        options: Which of the frames.
        output: Where drawings go.
        allow_damaged: Use what can be decoded of damaged images.

    Raises:
        UsageError: some frames could not be used; the others are answered.
    """
    from gap_export.streaming import answer_frames

    counts = FrameCounts()
    with ExitStack() as stack:
        frames = stack.enter_context(_frames_of(source, options, allow_damaged=allow_damaged))
        save = _saver(source, output, terminal, stack)
        answers = answer_frames(
            session,
            frames,
            expressions,
            same_frame=options.same_frame,
            allow_damaged=allow_damaged,
            shows=output.path is not None,
        )
        for answer in answers:
            terminal.json_line(answer.to_plain())
            counts.add(answer)
            if save is not None and answer.shown is not None:
                save(answer.shown, answer)
    counts.end(terminal)


class FrameCounts:
    """What became of the frames of a command."""

    def __init__(self) -> None:
        """Begin at none."""
        self._numbers = {"answered": 0, "skipped": 0, "failed": 0, "dropped": 0}
        self._failure: str | None = None

    def add(self, answer: FrameAnswer) -> None:
        """Count a frame, and those that were dropped before it."""
        self._numbers[answer.outcome] += 1
        self._numbers["dropped"] += answer.frame.num_dropped
        self._failure = self._failure or answer.error

    def end(self, terminal: Terminal) -> None:
        """Say it.

        Raises:
            UsageError: some frames could not be used.
        """
        said = ", ".join(f"{number} {what}" for what, number in self._numbers.items() if number)
        terminal.message(f"frames: {said or 'none'}")
        if self._failure is not None:
            num_frames = sum(self._numbers.values()) - self._numbers["dropped"]
            raise UsageError(
                f"{self._numbers['failed']} of {num_frames} frames could not be used",
                seen=f"the first: {self._failure}",
            )


@contextmanager
def _frames_of(
    source: FrameSource | str, options: FrameOptions, *, allow_damaged: bool
) -> Iterator[Iterable[SourceFrame]]:
    """The frames that are to be asked about, read for as long as the context lasts."""
    if isinstance(source, str):
        from gap_export.streaming import SourceFrame

        yield [SourceFrame(index=0, time_s=None, name=source, image=source)]
        return
    frames = source.frames(options.every or 1, allow_damaged)
    if options.newest:
        from gap_export.streaming import newest_frames

        with newest_frames(frames, paced=not source.is_live) as newest:
            yield newest
    else:
        with closing(frames):
            yield frames


def _saver(
    source: FrameSource | str, output: SavedOutput, terminal: Terminal, stack: ExitStack
) -> Callable[[Image, FrameAnswer], None] | None:
    """What draws the boxes of an answer: into a video that ends with ``stack``, or an image."""
    path = output.path
    if path is None:
        return None
    from gap_export.runtime.drawing import draw_boxes, save_drawing

    if isinstance(source, str):

        def save(shown: Image, answer: FrameAnswer) -> None:
            save_drawing(draw_boxes(shown, answer.groundings), path, rule=output.rule)
            terminal.message(f"wrote {visible(str(path))}")

        return save
    from gap_export.streaming.video import VideoWriter

    writer = VideoWriter(path, rule=output.rule)

    def say() -> None:
        if writer.is_written:
            terminal.message(f"wrote {visible(str(path))}")

    stack.callback(say)
    stack.enter_context(writer)

    def add(shown: Image, answer: FrameAnswer) -> None:
        writer.add(draw_boxes(shown, answer.groundings), answer.frame.time_s)

    return add
