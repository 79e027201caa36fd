"""A command in a process of its own, and the memory it has while it runs."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.05
_LIMIT_S = 4 * 3600
# Free memory at which a command is asked to end, which a builder does at its next step only, and at
# which it is made to: the machine would soon end processes of its own choice.
_ASK_BYTES, _KILL_BYTES = 2 << 30, 1 << 30
# Then it should choose this one.
_FIRST_TO_GO = "1000"


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What a command took.

    Attributes:
        exit_code: Negative: minus the signal that ended it.
        stdout: What it printed.
        message: What it last said on stderr, or why it was stopped.
        seconds: Wall time.
        peak_bytes: Most memory resident at once, mapped files that were touched included.
        anonymous_bytes: Most of it that is no file's and cannot be dropped and read again.
    """

    exit_code: int
    stdout: str
    message: str
    seconds: float
    peak_bytes: int
    anonymous_bytes: int


def watch(command: Sequence[str]) -> Watched:
    """Run a command; it is stopped where it would leave the machine without memory."""
    start = time.perf_counter()
    free = _free_bytes()
    peak = anonymous = 0
    stopped = ""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with subprocess.Popen(command, stdout=out, stderr=err) as process:
            proc = Path(f"/proc/{process.pid}")
            (proc / "oom_score_adj").write_text(_FIRST_TO_GO, encoding="ascii")
            while process.poll() is None:
                status = (proc / "status").read_text(encoding="ascii")
                # A build sets the high-water mark back for each engine: the last is not the most.
                peak = max(peak, _bytes_of("VmHWM", status))
                anonymous = max(anonymous, _bytes_of("RssAnon", status))
                left = _free_bytes()
                if left < _ASK_BYTES and not stopped:
                    stopped = (
                        f"stopped: of {_gib(free)} that were free when it began, {_gib(left)} "
                        "were left"
                    )
                    process.terminate()
                if left < _KILL_BYTES:
                    process.kill()
                if time.perf_counter() - start > _LIMIT_S and not stopped:
                    stopped = f"stopped: not done after {_LIMIT_S} s"
                    process.kill()
                time.sleep(_POLL_S)
        seconds = time.perf_counter() - start
        out.seek(0)
        err.seek(0)
        said = err.read().strip().rpartition("error: ")[2]
        return Watched(
            exit_code=process.returncode,
            stdout=out.read(),
            message=stopped or said,
            seconds=seconds,
            peak_bytes=peak,
            anonymous_bytes=anonymous,
        )


def _free_bytes() -> int:
    """Memory that is free, or soon would be, for the page cache gives way."""
    return _bytes_of("MemAvailable", Path("/proc/meminfo").read_text(encoding="ascii"))


def _bytes_of(field: str, text: str) -> int:
    """A line of /proc's; 0 where there is none, as of a process that has just ended."""
    found = re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found.group(1)) if found else 0


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB"
