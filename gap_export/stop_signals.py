"""SIGINT and SIGTERM as one exception, for the programs of the package."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Stopped(BaseException):
    """SIGINT or SIGTERM, raised where the program is so that open contexts clean up.

    Not a KeyboardInterrupt: libraries catch that one for purposes of their own.

    Attributes:
        exit_code: 128 + the signal's number, as shells have it.
        text: What to tell the user.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.exit_code = 128 + signum
        self.text = "interrupted" if signum == signal.SIGINT else "terminated"


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn SIGINT and SIGTERM into :class:`Stopped`; only the first counts, clean-up follows.

    Outside the main thread, where Python sets no signal handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop(signum: int, frame: FrameType | None) -> None:
        del frame
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(signum)

    before = {each: signal.getsignal(each) for each in signals}
    # Started with a signal ignored (nohup, a background job): it stays ignored.
    heard = [each for each in signals if before[each] is not signal.SIG_IGN]
    for each in heard:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each in heard:
            signal.signal(each, before[each])
