"""Progress on stderr: a bar on a terminal, otherwise a line for each long stage."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from gap_export.progress import Advance
from gap_export.visible import visible

LONG_S = 2.0


class TerminalProgress:
    """Implements :class:`gap_export.progress.Progress` on stderr.

    A stage that took longer than two seconds leaves one line behind; shorter ones leave nothing.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)
        self._bars: Progress | None = None

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Advance]:
        """Draw a bar of ``total`` steps (None: unknown) while the stage lasts."""
        title = visible(title)
        outermost = self._bars is None
        bars = self._bars = self._bars or self._start_bars()
        task = bars.add_task(title, total=total)
        started = time.monotonic()
        try:
            yield lambda steps: bars.advance(task, steps)
        finally:
            bars.remove_task(task)
            if outermost:
                self._bars = None
                bars.stop()
        elapsed = time.monotonic() - started
        if elapsed > LONG_S:
            self._console.print(f"{title}: {elapsed:.1f} s", markup=False, highlight=False)

    def _start_bars(self) -> Progress:
        bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        bars.start()
        return bars
