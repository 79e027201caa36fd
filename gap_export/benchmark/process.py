"""The other end of a worker: a process that runs one bundle, and is asked in lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from gap_export import errors
from gap_export.errors import GapExportError

if TYPE_CHECKING:
    from typing_extensions import Self

_MODULE = "gap_export.benchmark.worker"
# By which numpy's libraries, and many others, are told how many threads to take.
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_MOST_SHOWN = 300


class WorkerProcess:
    """A context manager; the process ends with it, and by itself where this one is killed.

    Args:
        num_threads: Threads of one operator; None: as many as its libraries like.
        command: What to start; by default the worker of this package.
    """

    def __init__(
        self, num_threads: int | None = None, *, command: Sequence[str] | None = None
    ) -> None:
        threads = {} if num_threads is None else dict.fromkeys(_THREADS, str(num_threads))
        self._said: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(  # noqa: S603
            command or [sys.executable, "-m", _MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            env={**os.environ, **threads},
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        # At a break the worker may be in the middle of an answer that takes minutes.
        if kind is not None:
            self._process.kill()
        self._process.communicate()
        self._said.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def do(self, order: str, **arguments: Any) -> Any:
        """Have one order done.

        Raises:
            GapExportError: what the worker met, as the same class; or it ended.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": order, "with": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise self._ended()
        reply: Mapping[str, Any] = json.loads(line)
        if "error" in reply:
            raised: type[GapExportError] = getattr(errors, reply["error"], GapExportError)
            said = dict(reply["said"])
            raise raised(said.pop("what"), **said)
        return reply["value"]

    def _ended(self) -> GapExportError:
        code = self._process.wait()
        self._said.seek(0)
        lines = self._said.read().decode(errors="replace").strip().splitlines()
        last = lines[-1][:_MOST_SHOWN] if lines else "it said nothing"
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return GapExportError(
            "the process that runs a bundle ended",
            seen=f"{how}: {last}",
            fix="signal 9 is often a lack of memory: measure fewer bundles at once"
            if code < 0
            else None,
        )
