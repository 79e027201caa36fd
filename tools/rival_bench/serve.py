"""A rival as a process: orders from stdin, results to stdout, each a line of JSON.

Standard library and numpy alone: it runs in the rival's environment. The orders are those of
``gap_export.benchmark.process.WorkerProcess``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

LONG, SHORT = 692, 289
# Tokens that are decoded to time one, and those of an answer.
NUM_DECODED, ANSWER = 16, 32
# Ids that every model knows and that are no special ones.
_FIRST_ID, _LAST_ID = 300, 30000
PROOF_LENGTH = 64


class Rival(Protocol):
    """What a rival can do; stages that it has not got are left out."""

    def open(self, folder: Path, shape: Path) -> str:
        """Load the model; say what runs it."""
        ...

    def stages(self, number: int) -> dict[str, float]:
        """Milliseconds by stage, of one round."""
        ...

    def logits(self, ids: list[int]) -> list[float] | None:
        """Of the token after those; None where it gives none."""
        ...


def token_ids(number: int, length: int) -> list[int]:
    """The prompt of a round: the same ids for every rival."""
    drawn = np.random.default_rng(number).integers(_FIRST_ID, _LAST_ID, length)
    return [int(one) for one in drawn]


def pixels(number: int) -> np.ndarray[Any, Any]:
    """The image of a round, uint8 [336, 336, 3]."""
    shape = (336, 336, 3)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds, and what it gave."""
    start = time.perf_counter()
    found = work()
    return 1e3 * (time.perf_counter() - start), found


def serve(rival: Rival) -> None:
    """Run orders until there are no more."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        results.write(json.dumps({"value": _run(rival, order["do"], order["with"])}) + "\n")
        results.flush()


def _run(rival: Rival, name: str, given: dict[str, Any]) -> Any:
    if name == "open":
        ms, runs = timed(lambda: rival.open(Path(given["folder"]), Path(given["shape"])))
        return {"ms": ms, "runs": runs}
    if name == "stages":
        return rival.stages(given["number"])
    if name == "logits":
        return rival.logits(token_ids(0, PROOF_LENGTH))
    return {"peak": getattr(rival, "peak", None) or peak_bytes()}


def peak_bytes() -> int:
    """The most that this process held at once."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
