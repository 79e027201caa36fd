#!/usr/bin/env python3
"""How long ``gap-export -h`` takes, and what it imports first.

    tools/bench_startup.py --runs 10

Prints the best and the median wall time of fresh processes, then the slowest imports.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import typer

COMMAND = [sys.executable, "-m", "gap_export", "-h"]
BAR_S = 0.5


def main(runs: int = 10) -> None:
    """Measure; exit code 1 where the median is above the bar."""
    seconds = sorted(_run_once() for _ in range(runs))
    median = statistics.median(seconds)
    print(f"gap-export -h: best {seconds[0]:.3f} s, median {median:.3f} s of {runs}")
    print("slowest imports, cumulative:")
    for microseconds, module in _slowest_imports(8):
        print(f"  {microseconds / 1e3:7.1f} ms  {module}")
    sys.exit(int(median > BAR_S))


def _run_once() -> float:
    start = time.perf_counter()
    subprocess.run(COMMAND, check=True, stdout=subprocess.DEVNULL, timeout=60)
    return time.perf_counter() - start


def _slowest_imports(count: int) -> list[tuple[int, str]]:
    command = [COMMAND[0], "-X", "importtime", *COMMAND[1:]]
    log = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stderr
    rows = []
    for line in log.splitlines():
        cells = line.removeprefix("import time:").split("|")
        if len(cells) == 3 and cells[1].strip().isdigit():
            rows.append((int(cells[1]), cells[2].strip()))
    return sorted(rows, reverse=True)[:count]


if __name__ == "__main__":
    typer.run(main)
