"""``gap-export serve`` as a process that is watched."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_LIMIT_S = 120.0


class Server:
    """A running server.

    Attributes:
        port: Where it listens.
        log: Its log lines so far, those that are JSON.
        memory: Megabytes of it and of its decoders, second by second.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.port = 0
        self.log: list[dict[str, Any]] = []
        self.memory: list[float] = []
        self._said = threading.Event()
        for work in (self._listen, self._watch):
            threading.Thread(target=work, daemon=True).start()
        if not self._said.wait(_LIMIT_S):
            raise SystemExit("the server does not start")
        while self._get("/readyz") is None:
            time.sleep(0.05)

    def figure(self, name: str) -> float:
        """The sum of a figure at ``/metrics``."""
        text = self._get("/metrics") or ""
        found = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """Signal it, and wait for its end; its exit code."""
        self._process.send_signal(signum)
        return self._process.wait(timeout=_LIMIT_S)

    @property
    def answered(self) -> dict[str, int]:
        """Statuses by the names of requests."""
        return {one["request"]: one["status"] for one in self.log if "status" in one}

    @property
    def bugs(self) -> list[dict[str, Any]]:
        """Log lines of errors that are ours."""
        return [one for one in self.log if one["level"] == "error"]

    def _get(self, path: str) -> str | None:
        with suppress(OSError):
            url = f"http://127.0.0.1:{self.port}{path}"
            with urllib.request.urlopen(url, timeout=_LIMIT_S) as answer:
                return str(answer.read().decode())
        return None

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            if line.startswith("{"):
                self.log.append(json.loads(line))
            elif line.startswith("serving "):
                self.port = int(line.rpartition(":")[2])
                self._said.set()
            else:
                print(line, end="", file=sys.stderr)

    def _watch(self) -> None:
        while self._process.poll() is None:
            if self.port:
                self.memory.append(_memory_of(self._process.pid))
            time.sleep(1.0)


@contextmanager
def serving(bundle: Path, *options: str) -> Iterator[Server]:
    """Serve a bundle at a free port, with its log in JSON on stderr."""
    command = [sys.executable, "-m", "gap_export", "serve", str(bundle), "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield Server(process)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=_LIMIT_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def _memory_of(pid: int) -> float:
    """Megabytes of proportional memory, of a process and its children."""
    total = 0
    with suppress(OSError, ValueError):
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (str(pid), *children):
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
    return total / 1024
