"""How long work tells what it is doing, without knowing who listens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

Advance = Callable[[int], None]


class Progress(Protocol):
    """A listener. The command line draws bars; libraries and tests are silent."""

    def stage(self, title: str, total: int | None = None) -> AbstractContextManager[Advance]:
        """Announce a stage of ``total`` steps (None: unknown); call what it gives per step done."""
        ...


class SilentProgress:
    """Says nothing."""

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Accept a stage and ignore it."""
        del title, total
        yield _ignore


def _ignore(steps: int) -> None:
    del steps
