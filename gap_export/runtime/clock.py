"""Milliseconds by stage of one call."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class StageClock:
    """Runs from when it is made."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what is done within."""
        started = time.perf_counter()
        yield
        self.add(name, 1e3 * (time.perf_counter() - started))

    def add(self, name: str, milliseconds: float) -> None:
        """Put down a stage that was timed elsewhere."""
        self._stages[name] = milliseconds

    def read(self) -> dict[str, float]:
        """Stages in the order they came, and ``total``."""
        return {**self._stages, "total": 1e3 * (time.perf_counter() - self._started)}
