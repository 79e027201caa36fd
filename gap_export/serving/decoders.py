"""Processes that decode images: a slow one is killed, a crash costs one request."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gap_export.errors import ImageError, ImageSizeError
from gap_export.runtime.image_view import PreparedImage
from gap_export.runtime.images.image import ColorOrder, ImageFrame
from gap_export.serving.decode_process import LENGTHS, pack, unpack_prepared

# Read at once from a process: pixel values of some megabytes.
_PIPE_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    """How an image is to be read; see ``runtime.images.image.read_image``.

    Attributes:
        shape: Height, width and channels where the bytes are pixels, not a file.
        color: Order of such pixels' channels.
        frame: Turned as EXIF says, or as stored.
        allow_damaged: Use what can be decoded.
    """

    shape: tuple[int, int, int] | None = None
    color: ColorOrder = "rgb"
    frame: ImageFrame = "upright"
    allow_damaged: bool = False


class Decoders:
    """A number of such processes, and the images that they are about to prepare."""

    def __init__(self, bundles: Mapping[str, Path], *, count: int, seconds: float) -> None:
        """Processes are started when they are needed, or by :meth:`start`.

        Args:
            bundles: By model, since each prepares images in its own way.
            count: The most processes.
            seconds: That decoding may take.
        """
        self._arguments = [f"{name}={path.resolve()}" for name, path in bundles.items()]
        self._count, self._seconds = count, seconds
        self._free = asyncio.Semaphore(count)
        self._idle: list[asyncio.subprocess.Process] = []
        self._preparing: dict[Hashable, asyncio.Task[PreparedImage]] = {}

    async def start(self) -> None:
        """Start all processes."""
        self._idle += [await self._spawn() for _ in range(self._count)]

    async def prepare(
        self, key: Hashable, model: str, data: bytes, options: ImageOptions
    ) -> PreparedImage:
        """An image as a model reads it; what is asked for by several at a time is decoded once.

        Args:
            key: The same for the same model, data and options, and for these alone.
            model: Whose preparation it is.
            data: A file.
            options: How it is read.

        Raises:
            ImageError: see ``read_image``; or decoding it took too long, or crashed.
        """
        task = self._preparing.get(key)
        if task is None:
            task = asyncio.create_task(self._prepare(model, data, options))
            self._preparing[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
        # A client that leaves takes the image from nobody else who asked for it.
        return await asyncio.shield(task)

    async def close(self) -> None:
        """End all processes."""
        for process in self._idle:
            await _end(process)
        self._idle.clear()

    def _forget(self, key: Hashable, done: asyncio.Task[PreparedImage]) -> None:
        self._preparing.pop(key, None)
        if not done.cancelled():
            # Where all who asked have left, its error is of no interest any more.
            done.exception()

    async def _prepare(self, model: str, data: bytes, options: ImageOptions) -> PreparedImage:
        async with self._free:
            process = self._idle.pop() if self._idle else await self._spawn()
            if process.returncode is not None:
                process = await self._spawn()
            head = {
                "model": model,
                "frame": options.frame,
                "allow_damaged": options.allow_damaged,
            }
            try:
                answer = await asyncio.wait_for(_exchange(process, pack(head, data)), self._seconds)
            except (TimeoutError, asyncio.TimeoutError):
                await _end(process)
                raise ImageSizeError(
                    "decoding the image takes too long",
                    allowed=f"{self._seconds:g} seconds",
                    fix="make it smaller first",
                ) from None
            except (OSError, asyncio.IncompleteReadError) as err:
                await _end(process)
                raise ImageError(
                    "decoding the image ended the decoder", seen=f"exit code {process.returncode}"
                ) from err
            except asyncio.CancelledError:
                await _end(process)
                raise
            self._idle.append(process)
        return unpack_prepared(*answer)

    async def _spawn(self) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "gap_export.serving.decode_process", *self._arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_PIPE_BYTES,
            # Ctrl-C in a terminal is for the server, which ends it once all is answered.
            start_new_session=True,
        )


async def _exchange(
    process: asyncio.subprocess.Process, message: tuple[bytes, bytes | memoryview]
) -> tuple[dict[str, object], bytes]:
    source, target = process.stdout, process.stdin
    assert source is not None and target is not None
    target.writelines(message)
    await target.drain()
    num_head, num_data = LENGTHS.unpack(await source.readexactly(LENGTHS.size))
    return json.loads(await source.readexactly(num_head)), await source.readexactly(num_data)


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.kill()
    # Its pipes are closed with it.
    await process.communicate()
