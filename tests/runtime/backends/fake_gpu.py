"""A GPU made of host memory: late, exact and unforgiving, as the real one is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gap_export.errors import GapExportError

ALIGNMENT = 256


@dataclass
class FakeDevice:
    """Work waits in its stream until somebody waits for it; memory is full of NaN at first.

    ``fails`` names methods that raise, as a GPU does that has no room or has failed.
    """

    name: str = "Fake GPU"
    compute_capability: int = 89
    fails: set[str] = field(default_factory=set)
    memory: dict[int, bytearray] = field(default_factory=dict)
    streams: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    graphs: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    capturing: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    next_handle: int = ALIGNMENT

    def allocate(self, num_bytes: int) -> int:
        self._note("allocate")
        address = self._handle(num_bytes)
        self.memory[address] = bytearray(b"\xff" * max(num_bytes, 1))
        return address

    def free(self, address: int) -> None:
        self._note("free")
        del self.memory[address]

    def create_stream(self) -> int:
        self._note("create_stream")
        stream = self._handle(1)
        self.streams[stream] = []
        return stream

    def destroy_stream(self, stream: int) -> None:
        self._note("destroy_stream")
        del self.streams[stream]

    def synchronize(self, stream: int) -> None:
        self._note("synchronize")
        work, self.streams[stream] = self.streams[stream], []
        for task in work:
            task()

    def clear(self, address: int, num_bytes: int, stream: int) -> None:
        self.enqueue(stream, lambda: self.write(address, np.zeros(num_bytes, np.uint8)))

    def upload(self, address: int, array: Any, stream: int) -> None:
        assert array.flags.c_contiguous
        self._note("upload")
        self.enqueue(stream, lambda: self.write(address, array))

    def download(self, array: Any, address: int, stream: int) -> None:
        assert array.flags.c_contiguous
        self._note("download")

        def copy() -> None:
            array[...] = self.read(address, array.shape, array.dtype)

        self.enqueue(stream, copy)

    def begin_capture(self, stream: int) -> None:
        self._note("begin_capture")
        self.capturing[stream] = []

    def end_capture(self, stream: int) -> int:
        self._note("end_capture")
        graph = self._handle(1)
        self.graphs[graph] = self.capturing.pop(stream)
        return graph

    def launch(self, graph: int, stream: int) -> None:
        self._note("launch")
        for task in self.graphs[graph]:
            self.enqueue(stream, task)

    def destroy_graph(self, graph: int) -> None:
        self._note("destroy_graph")
        del self.graphs[graph]

    def enqueue(self, stream: int, task: Callable[[], None]) -> None:
        self.capturing.get(stream, self.streams[stream]).append(task)

    def read(self, address: int, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array in memory, copied; more than was allocated there is an error."""
        stored = np.dtype(dtype)
        count = int(np.prod(shape, dtype=np.int64))
        assert count * stored.itemsize <= len(self.memory[address]), "read past the end"
        return np.frombuffer(self.memory[address], stored, count).reshape(shape).copy()

    def write(self, address: int, array: Any) -> None:
        raw = np.ascontiguousarray(array).tobytes()
        assert len(raw) <= len(self.memory[address]), "written past the end"
        self.memory[address][: len(raw)] = raw

    @property
    def is_clean(self) -> bool:
        """Whether everything was given back."""
        return not (self.memory or self.streams or self.graphs or self.capturing)

    def _handle(self, num_bytes: int) -> int:
        handle = self.next_handle
        self.next_handle += ALIGNMENT * (num_bytes // ALIGNMENT + 1)
        return handle

    def _note(self, method: str) -> None:
        self.calls.append(method)
        if method in self.fails:
            raise GapExportError(f"the fake GPU fails in {method}")
