"""What frames are read from: a folder, a pattern, a video file, a camera, an RTSP address."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gap_export.errors import ImageError, UsageError
from gap_export.runtime.images.image import ImageInput

IMAGE_SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)
VIDEO_SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts"),
    *(".m2ts", ".mjpeg", ".mjpg", ".h264", ".264", ".hevc", ".h265", ".265", ".flv", ".ogv"),
    *(".wmv", ".3gp"),
)
SOURCES = (
    "an image or video file, a folder, a pattern such as 'frames/*.png', a camera's number, or an "
    "address that begins with rtsp:// or rtsps://"
)
_RTSP = ("rtsp://", "rtsps://")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class SourceFrame:
    """One frame of a source.

    Attributes:
        index: Its number among all frames of the source, from 0.
        time_s: Seconds since the source's beginning, by its own clock; None where it has none.
        name: The file it is from, or the source.
        image: As a session takes it; None where it could not be decoded.
        error: Why it could not; else None.
        num_dropped: Frames that came before it, after the last one that was delivered, and were
            not, since newer ones were there.
    """

    index: int
    time_s: float | None
    name: str
    image: ImageInput | None
    error: str | None = None
    num_dropped: int = 0


@dataclass(frozen=True, kw_only=True)
class FrameSource:
    """Where frames come from.

    Attributes:
        name: As errors and answers call it, without a password.
        is_live: Frames come when they come, as of a camera.
        has_times: Frames have times; a folder's have none.
        files: Files that are read.
        frames: Begins to read, and delivers the first of every N frames; videos take, after N,
            whether what can be decoded of damaged frames is delivered.
    """

    name: str
    is_live: bool
    has_times: bool
    files: tuple[Path, ...]
    frames: Callable[[int, bool], Generator[SourceFrame]]


def find_source(text: str) -> FrameSource | None:
    """What a user means; nothing of a video, a camera or an address is opened yet.

    Args:
        text: A file or folder that exists, a pattern of Python's ``glob`` (``**`` for any number
            of folders), a camera's number, or an address.

    Returns:
        The source; None for one image, or what can only be meant as one.

    Raises:
        UsageError: no image in a folder, none that a pattern matches, or another kind of address.
        MissingDependencyError: videos, cameras and addresses need the extra ``stream``.
    """
    path = Path(text)
    if text.lower().startswith(_RTSP):
        return _video(text, name=_without_password(text), is_live=True)
    if _ADDRESS.match(text):
        raise UsageError(
            "no frames are read from such an address",
            seen=_without_password(text),
            allowed=SOURCES,
            fix="download it first",
        )
    try:
        if path.is_dir():
            return _folder(path)
        if path.exists():
            is_video = path.suffix.lower() in VIDEO_SUFFIXES and path.is_file()
            return _video(text, name=text, is_live=False) if is_video else None
    except (OSError, ValueError):
        # A name too long, or one with a NUL: reading it as an image says so.
        return None
    if text.isascii() and text.isdecimal():
        return _video(f"/dev/video{int(text)}", name=f"camera {text}", is_live=True, form="v4l2")
    if glob.has_magic(text):
        found = [Path(name) for name in glob.glob(text, recursive=True)]  # noqa: PTH207 - of any folder
        return _images(text, [one for one in found if one.is_file()], "no file matches the pattern")
    return None


def _folder(path: Path) -> FrameSource:
    found = [one for one in path.iterdir() if one.suffix.lower() in IMAGE_SUFFIXES]
    return _images(str(path), found, "no image in the folder")


def _images(name: str, files: list[Path], nothing: str) -> FrameSource:
    if not files:
        raise UsageError(
            nothing, seen=name, allowed=f"files that end in {', '.join(IMAGE_SUFFIXES)}"
        )
    ordered = tuple(sorted(files, key=_natural))
    return FrameSource(
        name=name,
        is_live=False,
        has_times=False,
        files=ordered,
        frames=partial(_read_images, ordered),
    )


def _read_images(
    files: tuple[Path, ...], every: int, allow_damaged: bool
) -> Generator[SourceFrame]:
    del allow_damaged  # whoever decodes the images decides
    for index in range(0, len(files), every):
        path = files[index]
        try:
            # Read once: what is looked at, asked about and drawn is then the same.
            image, error = read_image_file(path), None
        except ImageError as err:
            image, error = None, str(err)
        yield SourceFrame(index=index, time_s=None, name=str(path), image=image, error=error)


def read_image_file(path: Path) -> ImageInput:
    """The bytes of an image file.

    Raises:
        ImageError: it cannot be read.
    """
    # Not at the top: reading a video imports nothing of Pillow's readers.
    from gap_export.runtime.images.files import read_file

    return read_file(path)


def _video(text: str, *, name: str, is_live: bool, form: str | None = None) -> FrameSource:
    from gap_export.extras import require_extra

    require_extra("stream", "reading a video, a camera or an RTSP address")
    from gap_export.streaming.video import read_video

    return FrameSource(
        name=name,
        is_live=is_live,
        has_times=True,
        files=() if is_live else (Path(text),),
        frames=partial(read_video, text, name, form),
    )


def _natural(path: Path) -> tuple[object, ...]:
    """Sorts ``frame2`` before ``frame10``."""
    words = re.split(r"(\d+)", str(path))
    # Text and numbers alternate, so that only likes are compared.
    return tuple(int(word) if word.isdecimal() else word for word in words)


def _without_password(address: str) -> str:
    return re.sub(r"(://)[^/@]*@", r"\1", address)
