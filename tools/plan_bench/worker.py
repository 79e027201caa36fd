"""A worker of the benchmark whose clock is its processor time.

One thread's processor time is what its wall time would be if nothing else ran: a machine that is
shared delays the second and not the first.
"""

from __future__ import annotations

import time

from gap_export.benchmark import worker


def main() -> None:
    """Serve the process that started this one."""
    # All of gap-export asks the module, whose name is therefore enough.
    vars(time)["perf_counter"] = time.process_time
    worker.main()


if __name__ == "__main__":
    main()
