"""What a node does with images: a thread that answers the newest one, and an account of it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gap_export.errors import GapExportError
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.session import GroundingSession
from gap_export.streaming.newest import NewestSlot
from gap_export.streaming.ros.images import image_of


@dataclass(frozen=True, kw_only=True)
class AnswererStatus:
    """What became of the images so far.

    Attributes:
        received: Images that came.
        answered: Of them, those that were answered.
        dropped: Those that a newer one pushed out.
        failed: Those that could not be used, or were asked with an expression that cannot be.
        last_ms: Milliseconds that the last answer took, from decoding on.
        last_error: What the last one that failed said; None once one was answered after it.
    """

    received: int = 0
    answered: int = 0
    dropped: int = 0
    failed: int = 0
    last_ms: float | None = None
    last_error: str | None = None


class NewestAnswerer:
    """Answers the newest image; those that come in the meantime push each other out.

    Images that come before there is an expression are dropped.
    """

    def __init__(
        self,
        session: GroundingSession,
        publish: Callable[[Any, list[Grounding]], None],
        *,
        expressions: Sequence[str] = (),
        report: Callable[[str], None],
    ) -> None:
        """Begin to wait for images.

        Args:
            session: Answers; it stays open.
            publish: Takes the header of an image and its answers, in the thread that answers.
            expressions: What to look for; see :meth:`set_expressions`.
            report: Takes what went wrong with an image, in that thread as well.
        """
        self._session = session
        self._publish = publish
        self._report = report
        self._expressions = tuple(expressions)
        self._slot: NewestSlot[Any] = NewestSlot()
        self._lock = threading.Lock()
        self._status = AnswererStatus()
        self._thread = threading.Thread(target=self._run, name="answers", daemon=True)
        self._thread.start()

    @property
    def status(self) -> AnswererStatus:
        """What became of the images so far."""
        with self._lock:
            return self._status

    @property
    def expressions(self) -> tuple[str, ...]:
        """What is looked for."""
        return self._expressions

    def set_expressions(self, expressions: Sequence[str]) -> None:
        """Look for other things, from the next image that is begun on."""
        self._expressions = tuple(expressions)

    def offer(self, message: Any) -> None:
        """Leave an image; returns at once.

        Args:
            message: See :func:`image_of`; with a ``header``.
        """
        self._count("received")
        if self._expressions:
            self._slot.put(message)
        else:
            self._count("dropped")

    def close(self, timeout_s: float = 30.0) -> bool:
        """Answer what has begun and end; whether that happened in time."""
        self._slot.close()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (taken := self._slot.take()) is not None:
            message, num_dropped = taken
            self._count("dropped", num_dropped)
            began = time.monotonic()
            try:
                # A camera knows nothing of EXIF: boxes are of the pixels as they came.
                groundings = self._session.ground_batch(
                    image_of(message), self._expressions, frame="raw"
                )
                self._publish(message.header, groundings)
            except Exception as err:  # noqa: BLE001 - what answers must outlive one image
                said = str(err) if isinstance(err, GapExportError) else repr(err)
                self._count("failed", last_error=said)
                self._report(said)
            else:
                took = 1000 * (time.monotonic() - began)
                self._count("answered", last_ms=took, last_error=None)

    def _count(self, name: str, number: int = 1, **last: Any) -> None:
        with self._lock:
            counted: dict[str, Any] = {name: getattr(self._status, name) + number}
            self._status = replace(self._status, **counted, **last)
