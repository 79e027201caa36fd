"""Questions whose answers are known, and a client that costs next to nothing."""

from __future__ import annotations

import asyncio
import io
import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from PIL import Image

from gap_export.evaluation.refshapes import generate_scene
from gap_export.runtime.images.files import EncodedImage
from gap_export.runtime.session import GroundingSession

# Sides that scenes are shown at, and the form they are sent in.
SIZES = ((96, 96), (320, 240), (640, 480), (1280, 720))
FORMS = ("PNG", "JPEG", "pixels")
_BOUNDARY = "gap-export-load"


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request, and what must be answered.

    Attributes:
        body: A form.
        expected: What a session answers, by what must be equal; its scores by what must be close.
    """

    body: bytes
    expected: list[dict[str, Any]]

    def is_answered_by(self, plain: dict[str, Any]) -> bool:
        """Whether an answer is the session's."""
        found = [_comparable(one) for one in plain.get("groundings", ())]
        return len(found) == len(self.expected) and all(map(_is_same, found, self.expected))


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came back.

    Attributes:
        status: Of HTTP; 0 where the connection ended before all of it had come.
        plain: The body's JSON.
        seconds: From the first byte sent to the last one read.
        head: Header lines in lower case, by name.
    """

    status: int
    plain: dict[str, Any]
    seconds: float
    head: dict[str, str]


class Connection:
    """One connection that is kept, as HTTP/1.1 has it; opened anew where it was closed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, body: bytes, *, name: str = "") -> Reply:
        """Send a form and read the answer."""
        started = time.perf_counter()
        try:
            source, target = await self._open()
            target.write(_head_of(body, name) + body)
            await target.drain()
            status, head, data = await _read(source)
        except (OSError, EOFError, asyncio.IncompleteReadError):
            await self.close()
            return Reply(status=0, plain={}, seconds=time.perf_counter() - started, head={})
        seconds = time.perf_counter() - started
        if head.get("connection") == "close":
            await self.close()
        return Reply(status=status, plain=json.loads(data), seconds=seconds, head=head)

    async def leave(self, body: bytes, after_s: float) -> None:
        """Send a form and close the connection a while after."""
        with suppress(OSError):
            _, target = await self._open()
            target.write(_head_of(body, "") + body)
            await target.drain()
            await asyncio.sleep(after_s)
        await self.close()

    async def close(self) -> None:
        """Close it."""
        if self._streams is not None:
            self._streams[1].close()
            with suppress(OSError):
                await self._streams[1].wait_closed()
        self._streams = None

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        return self._streams


def make_questions(session: GroundingSession, count: int) -> list[Question]:
    """Questions of all sizes, forms and numbers of expressions, answered by a session."""
    found = []
    for number in range(count):
        size, form = SIZES[number % len(SIZES)], FORMS[number // len(SIZES) % len(FORMS)]
        scene = generate_scene(split="heldout", seed=1, index=number)
        image = Image.fromarray(scene.image).resize(size, Image.Resampling.BILINEAR)
        words = [one.text for one in scene.expressions[: 1 + number % 4]]
        data = encode(image, form)
        seen = image if form == "pixels" else EncodedImage(data=data, name="the image")
        answers = [session.ground(seen, one).to_plain() for one in words]
        body = make_body(data, words, image.size if form == "pixels" else None)
        found.append(Question(body=body, expected=[_comparable(one) for one in answers]))
    return found


def encode(image: Image.Image, form: str) -> bytes:
    """A file of that form, or pixels."""
    if form == "pixels":
        return image.tobytes()
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def make_body(data: bytes, words: list[str], size: tuple[int, int] | None = None) -> bytes:
    """A form with one question.

    Args:
        data: A file, or pixels.
        words: What to look for.
        size: Width and height of pixels.
    """
    fields = [("expressions", one) for one in words] + [("kept_tokens", "true")]
    if size is not None:
        fields.append(("shape", f"{size[1]},{size[0]},3"))
    parts = [
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
        for name, value in fields
    ]
    disposition = 'Content-Disposition: form-data; name="image"; filename="image"'
    head = f"{''.join(parts)}--{_BOUNDARY}\r\n{disposition}\r\n\r\n"
    return head.encode() + data + f"\r\n--{_BOUNDARY}--\r\n".encode()


def _head_of(body: bytes, name: str) -> bytes:
    lines = [
        "POST /v1/ground HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Type: multipart/form-data; boundary={_BOUNDARY}",
        f"Content-Length: {len(body)}",
        *([f"X-Request-Id: {name}"] if name else []),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def _read(source: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    raw = (await source.readuntil(b"\r\n\r\n")).decode("latin-1")
    first, *lines = raw.rstrip().split("\r\n")
    head = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
    data = await source.readexactly(int(head["content-length"]))
    return int(first.split()[1]), head, data


def _comparable(plain: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in plain.items() if name != "timings_ms"}


def _is_same(found: Any, expected: Any) -> bool:
    """Whether two answers are equal; scores are floats of a batch or of a single row."""
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            _is_same(value, expected[name]) for name, value in found.items()
        )
    if isinstance(found, list) and isinstance(expected, list):
        return len(found) == len(expected) and all(map(_is_same, found, expected))
    if isinstance(found, float) and isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-3, abs_tol=1e-6)
    return bool(found == expected)
