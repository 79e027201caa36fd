"""A Python function in a process of its own: its wall time and its peak memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parent.parent.parent
# VmHWM is the most that the process ever had in memory, mapped files that were touched included.
_CHILD = """
import json, sys
sys.path[:0] = [{root!r}, {tools!r}]
from {module} import {function}
value = {function}(**json.loads(sys.argv[1]))
with open("/proc/self/status") as status:
    peak = next(line for line in status if line.startswith("VmHWM"))
print("\\n" + json.dumps({{"value": value, "peak_kb": int(peak.split()[1])}}))
"""
# For the largest of models on the slowest of disks.
LIMIT_S = 4 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a process took.

    Attributes:
        value: What the function returned.
        seconds: Wall time from start to exit, imports included.
        peak_bytes: Most memory in use at once.
    """

    value: Any
    seconds: float
    peak_bytes: int


def measure(module: str, function: str, **arguments: Any) -> Measured:
    """Run ``module.function(**arguments)``; the arguments and its result must be JSON."""
    code = _CHILD.format(
        root=str(_ROOT), tools=str(_ROOT / "tools"), module=module, function=function
    )
    start = time.perf_counter()
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_S)
    seconds = time.perf_counter() - start
    if done.returncode != 0:
        raise RuntimeError(f"{module}.{function} failed:\n{done.stderr}")
    last = json.loads(done.stdout.splitlines()[-1])
    return Measured(value=last["value"], seconds=seconds, peak_bytes=1024 * int(last["peak_kb"]))
