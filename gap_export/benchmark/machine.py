"""This machine: its rates, measured; who else uses it; and what a process holds of its memory."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gap_export.benchmark.results import Memory

_STAT, _STATUS, _MEMINFO = Path("/proc/stat"), Path("/proc/self/status"), Path("/proc/meminfo")
_CPUINFO = Path("/proc/cpuinfo")
# Columns of /proc/stat (proc(5)) that are not work: idle and iowait. Time that a hypervisor gave to
# others is work of others. Guests' time is in user's already.
_IDLE, _COLUMNS = (3, 4), 8
# The sides of a product that is neither tiny nor long, and of a matrix that no cache holds.
_GEMM_SIDE, _READ_ROWS, _READ_COLS = 1024, 8192, 8192
_TRIES = 3


@dataclass
class Load:
    """What ran while something was timed.

    Attributes:
        wall_s: How long it took.
        cpu_s: Processor time of the process, all threads.
        others: Share of the processors' time that others took.
    """

    wall_s: float = 0.0
    cpu_s: float = 0.0
    others: float = 0.0


@contextmanager
def watched(pid: int | None = None) -> Iterator[Load]:
    """Time what is done within, and see who else ran meanwhile.

    Args:
        pid: The process that does it; None for this one.

    The kernel counts others' time in ticks of usually 10 ms; what a tick on each processor could be
    is not held against anyone.
    """
    load, cpus = Load(), sorted(os.sched_getaffinity(0))
    busy, own, start = busy_seconds(_STAT.read_text(), cpus), _own_seconds(pid), time.perf_counter()
    yield load
    load.wall_s = time.perf_counter() - start
    load.cpu_s = _own_seconds(pid) - own
    taken = busy_seconds(_STAT.read_text(), cpus) - busy - load.cpu_s
    slack = len(cpus) / os.sysconf("SC_CLK_TCK")
    load.others = max(0.0, taken - slack) / (load.wall_s * len(cpus))


def busy_seconds(stat: str, cpus: list[int]) -> float:
    """Time that processors were not idle since the machine started.

    Args:
        stat: Content of /proc/stat.
        cpus: Their numbers.
    """
    names = {f"cpu{number}" for number in cpus}
    ticks = 0
    for line in stat.splitlines():
        name, *columns = line.split()
        if name in names:
            kept = (int(n) for place, n in enumerate(columns[:_COLUMNS]) if place not in _IDLE)
            ticks += sum(kept)
    return ticks / os.sysconf("SC_CLK_TCK")


def memory_of_this_process() -> Memory:
    """What it holds now, and held at most."""
    sizes = _kilobytes(_STATUS)
    return Memory(peak=sizes["VmHWM"], steady=sizes["VmRSS"], own=sizes["RssAnon"])


def available_memory() -> tuple[int, int]:
    """Bytes that a new process could have without swapping, and all there are."""
    sizes = _kilobytes(_MEMINFO)
    return sizes["MemAvailable"], sizes["MemTotal"]


def gemm_gflops() -> float:
    """Best of a few products of two float32 matrices, in 1e9 operations a second."""
    rng = np.random.default_rng(0)
    one, two = (rng.standard_normal((_GEMM_SIDE, _GEMM_SIDE), dtype=np.float32) for _ in range(2))
    return 2 * _GEMM_SIDE**3 / _best(lambda: one @ two) / 1e9


def bandwidth_gb_s() -> float:
    """Best of a few products of a large float32 matrix and a vector, in 1e9 bytes a second."""
    matrix = np.ones((_READ_ROWS, _READ_COLS), dtype=np.float32)
    vector = np.ones(_READ_COLS, dtype=np.float32)
    return matrix.nbytes / _best(lambda: matrix @ vector) / 1e9


def processor() -> str:
    """Its name; the architecture where the system does not say more."""
    with suppress(OSError):
        for line in _CPUINFO.read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model") and value.strip():
                return value.strip()
    return platform.machine()


def _best(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(1 + _TRIES):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def _own_seconds(pid: int | None) -> float:
    if pid is not None:
        # Fields 14 and 15 of proc(5), behind the name, which may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _kilobytes(path: Path) -> dict[str, int]:
    """Sizes of a file of /proc in bytes, by name."""
    found = {}
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        number = value.removesuffix("kB").strip()
        if number.isdigit():
            found[name] = 1024 * int(number)
    return found
