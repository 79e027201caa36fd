"""Programs that tests start: each has a time limit, and none outlives its test."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

Finished = subprocess.CompletedProcess[str]
# Far above what any of them takes on a busy machine with two cores.
LIMIT_S = 300.0


def run_program(
    command: Sequence[object],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    seconds: float = LIMIT_S,
) -> Finished:
    """Run a program to its end; what it printed is in the result.

    Raises:
        AssertionError: it was still running after that many seconds, and was killed.
    """
    with start_program(command, cwd=cwd, env=env, seconds=seconds) as process:
        out, err = process.communicate(timeout=seconds + 10)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextmanager
def start_program(
    command: Sequence[object],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    seconds: float = LIMIT_S,
) -> Iterator[subprocess.Popen[str]]:
    """Start a program with pipes for stdin, stdout and stderr, and kill it on leaving.

    After that many seconds it is killed with all that it started, so whoever reads from it or waits
    for it goes on.

    Raises:
        AssertionError: it was still running after that many seconds.
    """
    expired = threading.Event()
    words = [str(word) for word in command]
    with subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=env,
        # A group of its own, which is killed as one.
        start_new_session=True,
    ) as process:

        def end() -> None:
            expired.set()
            _kill(process)

        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield process
        finally:
            timer.cancel()
            _kill(process)
            if expired.is_set():
                raise AssertionError(f"killed, still running after {seconds:g} s: {words}")


def _kill(process: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
