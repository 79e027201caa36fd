"""Values kept up to a number of bytes; the one not used for longest goes first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

from gap_export.errors import UsageError


class ByteStore:
    """A least-recently-used store that threads may share.

    Attributes:
        max_bytes: The most it holds; 0 holds nothing.
        num_bytes: What it holds.
    """

    def __init__(self, max_bytes: int, *, what: str) -> None:
        """An empty store.

        Args:
            max_bytes: See the class.
            what: Name of that number, for the message.

        Raises:
            UsageError: it is no whole number of 0 or more.
        """
        if type(max_bytes) is not int or max_bytes < 0:
            raise UsageError(
                f"{what} is no size in bytes",
                seen=repr(max_bytes),
                allowed="a whole number, 0 to keep nothing",
            )
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()

    def has_room(self, num_bytes: int) -> bool:
        """Whether a value of that size can be kept at all."""
        return num_bytes <= self.max_bytes

    def get(self, key: Hashable) -> Any:
        """What was put under a key; None where it was not, or is gone."""
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return self._kept[key][0]

    def put(self, key: Hashable, value: Any, num_bytes: int) -> None:
        """Keep a value, unless it is larger than the store, in place of those that must go."""
        if not self.has_room(num_bytes):
            return
        with self._lock:
            self._drop(key)
            self._kept[key] = value, num_bytes
            self.num_bytes += num_bytes
            while self.num_bytes > self.max_bytes:
                self._drop(next(iter(self._kept)))

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0

    def _drop(self, key: Hashable) -> None:
        _, num_bytes = self._kept.pop(key, (None, 0))
        self.num_bytes -= num_bytes
