"""From a request's image and expressions to groundings: the way that both routes take."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fastapi import Request

from gap_export.errors import UnknownModelError
from gap_export.runtime.grounding import Grounding
from gap_export.serving.bodies import image_key
from gap_export.serving.decoders import Decoders, ImageOptions
from gap_export.serving.gate import CLIENT_LEFT, Account
from gap_export.serving.metrics import Metrics
from gap_export.serving.options import ServeSettings
from gap_export.serving.problems import RefusedError
from gap_export.serving.waiting import Positions, Ticket, expired
from gap_export.serving.worker import ModelWorker

_MAX_DECODERS = 4


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a request asks.

    Attributes:
        model: Its name; None for the first.
        image: A file's bytes, or pixels.
        options: How the image is read.
        expressions: What to look for.
        positions: Position ids; None for the bundle's own.
        stream: Name of the stream that the image is a frame of.
        deadline_ms: Time for all of it; None for the server's.
    """

    model: str | None
    image: bytes
    options: ImageOptions
    expressions: Sequence[str]
    positions: Positions | None = None
    stream: str | None = None
    deadline_ms: int | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What became of a question.

    Attributes:
        model: Who answered.
        groundings: One for each expression.
        timings_ms: Of the request by stage.
    """

    model: ModelWorker
    groundings: list[Grounding]
    timings_ms: dict[str, float]


class Models:
    """The models of an application, and what decodes images for them.

    Attributes:
        workers: By name.
        metrics: Counts what they do.
    """

    def __init__(self, settings: ServeSettings, metrics: Metrics) -> None:
        """Open all bundles.

        Raises:
            GapExportError: one cannot be opened.
        """
        self.metrics = metrics
        self.workers: dict[str, ModelWorker] = {}
        self._settings = settings
        bundles = settings.named_bundles()
        try:
            for name, path in bundles.items():
                self.workers[name] = ModelWorker(name, path, settings, metrics)
        except BaseException:
            self._close_workers()
            raise
        self._decoders = Decoders(
            bundles,
            count=min(_MAX_DECODERS, os.cpu_count() or 1),
            seconds=settings.options.decode_s,
        )

    async def start(self) -> None:
        """Start what decodes images."""
        await self._decoders.start()

    async def close(self) -> None:
        """Answer what is in line, and end."""
        await asyncio.to_thread(self._close_workers)
        await self._decoders.close()

    def find(self, name: str | None) -> ModelWorker:
        """A model by name.

        Raises:
            UnknownModelError: there is none.
            RefusedError: it is not ready.
        """
        worker = next(iter(self.workers.values())) if name is None else self.workers.get(name)
        if worker is None:
            raise UnknownModelError(
                "no model of that name", seen=name, allowed=", ".join(self.workers)
            )
        if not worker.is_ready:
            raise RefusedError(
                503,
                "the model is not ready",
                seen=worker.failure or "it is warming up",
                headers={"Retry-After": "1"},
            )
        return worker

    def retry_after(self) -> int:
        """Seconds until the longest line is answered."""
        return max(worker.retry_after() for worker in self.workers.values())

    async def ask(self, question: Question, request: Request) -> Asked:
        """Answer a question, as long as its client waits and its deadline is not over.

        Raises:
            RefusedError: it is over; the client left; a newer frame came; the server is stopping.
            GapExportError: the session refuses the question.
        """
        started, account = time.monotonic(), Account.of(request.scope)
        worker = self.find(question.model)
        account.about |= {"model": worker.name, "expressions": len(question.expressions)}
        if question.deadline_ms is not None:
            account.deadline = min(account.deadline, started + question.deadline_ms / 1e3)
        ticket = Ticket(
            key=image_key(worker.name, question.image, question.options),
            expressions=tuple(question.expressions),
            positions=question.positions,
            deadline=account.deadline,
            stream=question.stream and (account.caller, question.stream),
        )
        with worker.line.admitted(ticket):
            self.metrics.waiting.labels(worker.name).set(len(worker.line))
            work = asyncio.ensure_future(self._work(worker, ticket, question))
            gone = asyncio.ensure_future(until_gone(request))
            left = max(account.deadline - time.monotonic(), 0)
            try:
                await asyncio.wait({work, gone}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                if not work.done():
                    raise RefusedError(CLIENT_LEFT, "the client left") if gone.done() else expired()
                groundings, prepared = work.result()
            finally:
                work.cancel()
                gone.cancel()
        self.metrics.waiting.labels(worker.name).set(len(worker.line))
        return Asked(
            model=worker,
            groundings=groundings,
            timings_ms=self._timings(ticket, started, prepared),
        )

    async def _work(
        self, worker: ModelWorker, ticket: Ticket, question: Question
    ) -> tuple[list[Grounding], float]:
        """The answers, and when the image was prepared."""
        shape = question.options.shape
        if shape is not None:
            # Nothing is to be decoded.
            ticket.image = np.frombuffer(question.image, np.uint8).reshape(shape)
            ticket.color = question.options.color
        else:
            ticket.image = await self._decoders.prepare(
                ticket.key, worker.name, question.image, question.options
            )
        prepared = time.monotonic()
        worker.line.put(ticket)
        return await asyncio.wrap_future(ticket.answer), prepared

    def _timings(self, ticket: Ticket, started: float, prepared: float) -> dict[str, float]:
        assert ticket.started is not None, "it was answered"
        ended = time.monotonic()
        timings = {
            "decode": prepared - started,
            "wait": ticket.started - prepared,
            "run": ended - ticket.started,
            "total": ended - started,
        }
        return {stage: round(1e3 * seconds, 3) for stage, seconds in timings.items()}

    def _close_workers(self) -> None:
        for worker in self.workers.values():
            worker.close(self._settings.options.deadline_s)


async def until_gone(request: Request) -> None:
    """Wait until the client closes the connection; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
