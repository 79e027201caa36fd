"""Videos by PyAV: reading frames of files, cameras and RTSP addresses, and writing a file."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from gap_export.errors import OutputError, UsageError
from gap_export.outputs import DRAWING_SOFTWARE, NO_RULE, OutputRule
from gap_export.runtime.images.files import MAX_PIXELS
from gap_export.streaming.sources import SourceFrame

if TYPE_CHECKING:
    from typing_extensions import Self

VIDEO = "the video"
VIDEO_SUFFIX = ".mp4"
# Seconds until a camera or an address must have answered, and until its next frame must be there.
_TIMEOUT_S = (15.0, 15.0)
# Of frames without a time, as those of a folder are.
_FRAMES_PER_S = 5
# Times of a written video are in milliseconds: a camera's frames come when they come.
_TIME_BASE = Fraction(1, 1000)


def read_video(
    place: str, name: str, form: str | None, every: int, allow_damaged: bool
) -> Generator[SourceFrame]:
    """The frames of a video, as displayed: RGB, turned as the video says.

    Args:
        place: A file, a device or an address.
        name: What errors and frames call it.
        form: FFmpeg's name of a device's format; None: it finds out.
        every: Deliver the first of so many frames; the others are decoded alone.
        allow_damaged: Deliver what a decoder makes up of damaged frames, as players do; else such
            a frame has an error and no image, as far as the decoder notices.

    Raises:
        UsageError: it cannot be opened, holds no video, has frames that are too large, or a live
            source ended.
    """
    options = {"rtsp_transport": "tcp"} if "://" in place else {}
    try:
        container = av.open(place, format=form, options=options, timeout=_TIMEOUT_S)
    except (av.FFmpegError, OSError, ValueError) as err:
        raise _refusal("cannot be opened", name, err) from err
    with container:
        if not container.streams.video:
            raise UsageError("there is no video in this file", seen=name)
        stream = container.streams.video[0]
        # Several frames at a time are decoded, which costs a live source their delay.
        stream.thread_type = "SLICE" if form or "://" in place else "AUTO"
        if not allow_damaged:
            stream.codec_context.options = {"err_detect": "explode"}
        first: float | None = None
        for index, frame in enumerate(_decoded(container, stream, name)):
            if index % every:
                continue
            if isinstance(frame, str):
                yield SourceFrame(index=index, time_s=None, name=name, image=None, error=frame)
                continue
            first = frame.time if first is None else first
            time_s = None if frame.time is None or first is None else frame.time - first
            yield SourceFrame(index=index, time_s=time_s, name=name, image=_upright(frame, name))


def _decoded(container: Any, stream: Any, name: str) -> Iterator[Any]:
    """Frames, or in the place of one that is damaged a sentence."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except (av.FFmpegError, OSError) as err:
            raise _refusal("ended", name, err) from err
        if packet is None:
            return
        try:
            frames = packet.decode()
        except av.FFmpegError as err:
            yield f"the frame is damaged: {err.strerror or err}"
            continue
        yield from frames


def _upright(frame: Any, name: str) -> NDArray[np.uint8]:
    if frame.width * frame.height > MAX_PIXELS:
        raise UsageError(
            "the video's frames are too large",
            seen=f"{name}: {frame.width}x{frame.height} pixels",
            allowed=f"at most {MAX_PIXELS:,} pixels",
        )
    pixels: NDArray[np.uint8] = frame.to_ndarray(format="rgb24")
    # FFmpeg's angle is counterclockwise, and so is numpy's.
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90) % 4))


def _refusal(what: str, name: str, err: Exception) -> UsageError:
    reason = getattr(err, "strerror", None) or str(err)
    return UsageError(
        f"the source {what}",
        seen=f"{name}: {reason}",
        fix="see whether a player that uses FFmpeg opens it",
    )


class VideoWriter:
    """Writes drawings into an MP4 file (H.264); a context manager.

    The file is there when the context ends, also by an error or a signal, with the frames that
    were added until then; with none of them nothing is written.

    Attributes:
        path: The file.
        is_written: Whether it is there.
    """

    def __init__(self, path: Path, *, rule: OutputRule = NO_RULE) -> None:
        """Check the place.

        Raises:
            OutputError: another suffix, or the file could not, or must not, be written.
        """
        check_video_path(path, rule)
        self.path = path
        self._rule = rule
        self._stack = ExitStack()
        self._container: Any = None
        self._stream: Any = None
        self._size = (0, 0)
        self._last_ms = -1
        self.is_written = False

    def add(self, drawing: Image.Image, time_s: float | None) -> None:
        """Add a frame; one of another size than the first one's is fitted into that.

        Args:
            drawing: RGB.
            time_s: Seconds since the beginning; None: a fifth of a second after the last.

        Raises:
            OutputError: the file cannot be written.
        """
        # Two frames must not have one time, and none goes back.
        after = self._last_ms + (1000 // _FRAMES_PER_S if self._last_ms >= 0 else 1)
        time_ms = after if time_s is None else max(round(1000 * time_s), self._last_ms + 1)
        try:
            if self._container is None:
                self._begin(drawing.size)
            if drawing.size != self._size:
                drawing = ImageOps.pad(drawing, self._size)
            frame = av.VideoFrame.from_ndarray(np.asarray(drawing), format="rgb24")
            frame.pts, frame.time_base = time_ms, _TIME_BASE
            self._container.mux(self._stream.encode(frame))
        except (av.FFmpegError, OSError) as err:
            raise self._refusal(err) from err
        self._last_ms = time_ms

    def _begin(self, size: tuple[int, int]) -> None:
        # The colors of H.264 have half the resolution, so that sides are even.
        self._size = (size[0] + size[0] % 2, size[1] + size[1] % 2)
        part = self._stack.enter_context(self._rule.replacing(VIDEO, self.path))
        self._container = av.open(
            str(part),
            "w",
            format="mp4",
            # Known by it as ours, see gap_export.outputs.
            options={"movflags": "use_metadata_tags"},
        )
        self._container.metadata["comment"] = DRAWING_SOFTWARE
        self._stream = self._container.add_stream("libx264", rate=30, options={"crf": "20"})
        self._stream.width, self._stream.height = self._size
        self._stream.pix_fmt = "yuv420p"
        self._stream.codec_context.time_base = _TIME_BASE

    def _refusal(self, err: Exception) -> OutputError:
        reason = getattr(err, "strerror", None) or str(err)
        return OutputError("the video cannot be written", seen=f"{self.path}: {reason}")

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """End the file and put it in its place."""
        with self._stack:
            if self._container is not None:
                try:
                    with self._container:
                        self._container.mux(self._stream.encode(None))
                except (av.FFmpegError, OSError) as err:
                    raise self._refusal(err) from err
        self.is_written = self._container is not None


def check_video_path(path: Path, rule: OutputRule = NO_RULE) -> None:
    """Refuse a place where no video could be written.

    Raises:
        OutputError: another suffix, or the file could not, or must not, be written.
    """
    if path.suffix.lower() != VIDEO_SUFFIX:
        raise OutputError("videos are saved in one format", seen=path, allowed=VIDEO_SUFFIX)
    rule.check({VIDEO: path})
