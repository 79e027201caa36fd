"""The line of questions before a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gap_export.runtime.grounding import Grounding
from gap_export.runtime.image_view import PreparedImage
from gap_export.runtime.images.image import ColorOrder
from gap_export.serving.problems import RefusedError

Positions = Literal["gap", "compact"]


@dataclass(kw_only=True, eq=False)
class Ticket:
    """A question that waits for its answer.

    Attributes:
        key: Tickets of the same key are about one image, seen in one way.
        expressions: What to look for.
        positions: Position ids to answer with; None for the bundle's own.
        deadline: When it is of no use any more, by ``time.monotonic()``.
        stream: Whose frame the image is, of which the newest wins; None for a single image.
        image: The image, once it is decoded and prepared; or pixels, uint8 [H, W, C].
        color: Order of the channels of pixels.
        answer: What the line or the worker says.
        started: When the worker took it.
    """

    key: Hashable
    expressions: tuple[str, ...]
    positions: Positions | None
    deadline: float
    stream: Hashable | None = None
    image: PreparedImage | NDArray[np.uint8] | None = None
    color: ColorOrder = "rgb"
    answer: Future[list[Grounding]] = field(default_factory=Future)
    started: float | None = None


class WaitingLine:
    """First come, first served; what asks about the image of the first goes with it.

    Attributes:
        batch: The most expressions that :meth:`take` puts together, and that run at a time.
    """

    def __init__(self, batch: int) -> None:
        """An empty line.

        Args:
            batch: See the class.
        """
        self.batch = batch
        self._waiting: list[Ticket] = []
        self._admitted: list[Ticket] = []
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """Questions that are waiting, those included whose images are being prepared."""
        with self._changed:
            return sum(one.started is None for one in self._admitted)

    @contextmanager
    def admitted(self, ticket: Ticket) -> Iterator[None]:
        """Keep account of a ticket while its request is there; older frames give way to it.

        Raises:
            RefusedError: the line is closed.
        """
        with self._changed:
            if self._closed:
                raise stopping()
            for older in self._admitted:
                if self._gives_way(older, ticket):
                    self._leave(older)
                    older.answer.set_exception(
                        RefusedError(409, "superseded: a newer frame of the stream has come")
                    )
            self._admitted.append(ticket)
        try:
            yield
        finally:
            with self._changed:
                self._admitted.remove(ticket)
                self._leave(ticket)
                self._changed.notify()
            ticket.answer.cancel()

    def put(self, ticket: Ticket) -> None:
        """Let a ticket wait whose image is prepared, unless it has its answer."""
        with self._changed:
            if not ticket.answer.done():
                self._waiting.append(ticket)
                self._changed.notify()

    def take(self) -> list[Ticket]:
        """Wait for tickets about one image; none once the line is closed and empty.

        What is past its deadline is answered so, and not taken.
        """
        with self._changed:
            while True:
                self._expire()
                group = self._take_group()
                if group:
                    return group
                if self._closed and not self._admitted:
                    return []
                self._changed.wait(timeout=1.0)

    def close(self) -> None:
        """Let nothing in any more; what is in line is still answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _take_group(self) -> list[Ticket]:
        """The first ticket, and those that go with it; none where their clients have left."""
        group: list[Ticket] = []
        room = self.batch
        for ticket in list(self._waiting):
            first = group[0] if group else ticket
            same = ticket.key == first.key and ticket.positions == first.positions
            if ticket is first or (same and len(ticket.expressions) <= room):
                self._waiting.remove(ticket)
                if ticket.answer.set_running_or_notify_cancel():
                    ticket.started = time.monotonic()
                    room -= len(ticket.expressions)
                    group.append(ticket)
        return group

    def _expire(self) -> None:
        now = time.monotonic()
        for ticket in [one for one in self._waiting if one.deadline <= now]:
            self._waiting.remove(ticket)
            # From here on its client can no longer withdraw it.
            if ticket.answer.set_running_or_notify_cancel():
                ticket.answer.set_exception(expired())

    def _leave(self, ticket: Ticket) -> None:
        if ticket in self._waiting:
            self._waiting.remove(ticket)

    @staticmethod
    def _gives_way(older: Ticket, newer: Ticket) -> bool:
        return (
            newer.stream is not None
            and older.stream == newer.stream
            and older.key != newer.key
            and not older.answer.running()
            and not older.answer.done()
        )


def expired() -> RefusedError:
    """The answer to a question whose time is over."""
    return RefusedError(
        504, "the deadline of the request is over", fix="ask again, or give more time"
    )


def stopping() -> RefusedError:
    """The answer to a question that comes too late."""
    return RefusedError(503, "the server is stopping", headers={"Retry-After": "5"})
