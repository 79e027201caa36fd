"""The newest of what keeps coming, for one that takes longer than it takes to come."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Generic, TypeVar

from gap_export.streaming.sources import SourceFrame

_Item = TypeVar("_Item")
# What waits for a source that sends nothing more looks that often whether it is to end.
_LOOK_S = 0.5


class NewestSlot(Generic[_Item]):
    """Room for one item, which a newer one pushes out. Threads may share it."""

    def __init__(self) -> None:
        """Make room."""
        self._changed = threading.Condition()
        self._item: _Item | None = None
        self._num_pushed_out = 0
        self._is_closed = False

    def put(self, item: _Item) -> None:
        """Leave an item; one that was not taken is gone."""
        with self._changed:
            if self._item is not None:
                self._num_pushed_out += 1
            self._item = item
            self._changed.notify_all()

    def take(self) -> tuple[_Item, int] | None:
        """The newest item, and how many before it nobody took; waits for one.

        Returns:
            None once the slot is closed and empty.
        """
        with self._changed:
            while self._item is None and not self._is_closed:
                self._changed.wait(_LOOK_S)
            if self._item is None:
                return None
            found = self._item, self._num_pushed_out
            self._item, self._num_pushed_out = None, 0
            return found

    def close(self) -> None:
        """Nothing comes any more; what is there may still be taken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    @property
    def is_closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._is_closed


@contextmanager
def newest_frames(frames: Iterator[SourceFrame], *, paced: bool) -> Iterator[Iterator[SourceFrame]]:
    """Read frames in a thread, and deliver the newest one each time.

    Args:
        frames: Of a source with times.
        paced: Let each frame wait for its time, as if a camera sent what a file holds.
    """
    slot: NewestSlot[SourceFrame] = NewestSlot()
    failures: list[Exception] = []

    def read() -> None:
        try:
            for frame in _paced(frames, slot) if paced else frames:
                if slot.is_closed:
                    break
                slot.put(frame)
        except Exception as err:  # noqa: BLE001 - raised again where frames are taken
            failures.append(err)
        finally:
            slot.close()

    def delivered() -> Iterator[SourceFrame]:
        while (taken := slot.take()) is not None:
            frame, num_dropped = taken
            yield replace(frame, num_dropped=num_dropped)
        if failures:
            raise failures[0]

    # A camera that hangs must not keep the program from ending.
    thread = threading.Thread(target=read, name="frames", daemon=True)
    thread.start()
    try:
        yield delivered()
    finally:
        slot.close()
        thread.join(2 * _LOOK_S)


def _paced(frames: Iterator[SourceFrame], slot: NewestSlot[SourceFrame]) -> Iterator[SourceFrame]:
    began: float | None = None
    for frame in frames:
        now = time.monotonic()
        if frame.time_s is not None:
            began = now - frame.time_s if began is None else began
            while not slot.is_closed and (left := began + frame.time_s - time.monotonic()) > 0:
                time.sleep(min(left, _LOOK_S))
        yield frame
