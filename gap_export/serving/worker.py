"""The thread that owns a bundle's session and answers what waits in its line."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np

from gap_export.errors import GapExportError
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.session import GroundingSession
from gap_export.serving.metrics import Metrics
from gap_export.serving.options import ServeSettings
from gap_export.serving.waiting import Positions, Ticket, WaitingLine
from gap_export.spec.manifest import Manifest

# How much the newest measurement counts in the time that a request takes.
_NEWEST = 0.2
log = logging.getLogger(__name__)


class ModelWorker:
    """One model: its line and its thread.

    Attributes:
        name: What requests call it.
        manifest: What it is.
        line: Where questions wait.
        failure: Why it cannot answer, where its warm-up failed.
    """

    def __init__(self, name: str, bundle: Path, settings: ServeSettings, metrics: Metrics) -> None:
        """Open the bundle in the thread that will run it; warming up goes on behind this call.

        Raises:
            GapExportError: see ``GroundingSession.open``.
        """
        self.name, self.bundle = name, bundle
        self.line: WaitingLine
        self.failure: GapExportError | None = None
        self._settings, self._metrics = settings, metrics
        self._seconds_per_request = 0.0
        self._is_warm = threading.Event()
        self._sessions: dict[Positions | None, GroundingSession] = {}
        opened: Future[Manifest] = Future()
        # A daemon: an application that was made and never run keeps no process alive.
        self._thread = threading.Thread(
            target=self._run, args=[opened], name=f"model {name}", daemon=True
        )
        self._thread.start()
        self.manifest = opened.result()

    @property
    def is_ready(self) -> bool:
        """Whether it has warmed up and can answer."""
        return self._is_warm.is_set() and self.failure is None

    def wait_until_warm(self) -> None:
        """Wait until it can answer, or :attr:`failure` says why it cannot."""
        self._is_warm.wait()

    def retry_after(self) -> int:
        """Seconds, at least one, until what waits now is answered, by the time requests took."""
        return max(1, math.ceil((len(self.line) + 1) * self._seconds_per_request))

    def close(self, timeout: float) -> None:
        """Answer what is in line, then end; what takes longer is left to the process's end."""
        self.line.close()
        self._thread.join(timeout)

    def _run(self, opened: Future[Manifest]) -> None:
        try:
            session = self._settings.open(self.bundle)
        except BaseException as err:  # noqa: BLE001 - it is raised where the worker is made
            opened.set_exception(err)
            return
        with session:
            self._sessions[None] = session
            most = session.backend.max_batch or self._settings.options.batch
            self.line = WaitingLine(min(most, self._settings.options.batch))
            opened.set_result(session.manifest)
            self._warm_up(session)
            while group := self.line.take():
                self._answer(group)

    def _warm_up(self, session: GroundingSession) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
        started = time.monotonic()
        try:
            session.ground(noise, "a")
            started = time.monotonic()
            session.ground(noise, "a")
        except GapExportError as err:
            log.exception("the model %s cannot be used", self.name)
            self.failure = err
        self._seconds_per_request = time.monotonic() - started
        self._is_warm.set()

    def _answer(self, group: Sequence[Ticket]) -> None:
        """Answer tickets about one image; where one of them spoils it, each by itself."""
        started = time.monotonic()
        expressions = [words for ticket in group for words in ticket.expressions]
        try:
            answers = self._ground(group[0], expressions)
        except Exception as err:  # noqa: BLE001 - the request it is of answers for it
            if len(group) > 1:
                for ticket in group:
                    self._answer([ticket])
            else:
                group[0].answer.set_exception(err)
            return
        for ticket in group:
            count = len(ticket.expressions)
            ticket.answer.set_result(answers[:count])
            answers = answers[count:]
        each = (time.monotonic() - started) / len(group)
        self._seconds_per_request += _NEWEST * (each - self._seconds_per_request)
        self._metrics.ran_together.labels(self.name).observe(len(expressions))

    def _ground(self, first: Ticket, expressions: Sequence[str]) -> list[Grounding]:
        size = self.line.batch
        assert first.image is not None, "only tickets with an image are put in line"
        with self._session(first.positions).look(first.image, color=first.color) as view:
            return [
                grounding
                for start in range(0, len(expressions), size)
                for grounding in view.ground_batch(expressions[start : start + size])
            ]

    def _session(self, positions: Positions | None) -> GroundingSession:
        """The bundle's own session, or one of other positions in the same backend."""
        own = self._sessions[None]
        if positions in (None, own.positions):
            return own
        if positions not in self._sessions:
            self._sessions[positions] = GroundingSession(
                own.manifest,
                self.bundle,
                own.backend,
                positions=positions,
                grammar=self._settings.grammar,
            )
        return self._sessions[positions]
