"""The KV cache in a GPU's memory, for both ways in which a graph may hand it on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from gap_export.engines.plan import EngineSpec
from gap_export.runtime.backends.device import DeviceMemory
from gap_export.runtime.backends.tensorrt_engine import Bound, EngineRunner

PAST, PRESENT = "past_key_values.", "present."


@dataclass
class TensorRTCache:
    """How much of the backend's KV buffers one batch has filled."""

    batch_size: int
    length: int = 0


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """What is cached: [B, heads, slots, dim] for each name.

    Attributes:
        names: Without ``past_key_values.`` or ``present.``, e.g. ``0.key``.
        heads: How many keys and values have.
        dim: Size of a head.
        capacity: Slots there is room for.
        itemsize: Bytes of a number.
    """

    names: tuple[str, ...]
    heads: int
    dim: int
    capacity: int
    itemsize: int

    def num_bytes(self, batch_size: int) -> int:
        """Bytes of one tensor."""
        return batch_size * self.heads * self.capacity * self.dim * self.itemsize


class KVBuffers(ABC):
    """Keys and values of all layers on the GPU: past, which a step reads, and present."""

    num_sets: int

    def __init__(self, memory: DeviceMemory, layout: KVLayout, max_batch: int) -> None:
        self.max_batch = max_batch
        self._memory, self._layout = memory, layout
        self._sets = [
            {name: memory.allocate(layout.num_bytes(max_batch)) for name in layout.names}
            for _ in range(self.num_sets)
        ]

    @abstractmethod
    def reset(self) -> None:
        """Make them fit for a new batch."""

    @abstractmethod
    def num_slots(self, cache: TensorRTCache) -> int:
        """Slots of past, as the graph is fed them."""

    def past(self, cache: TensorRTCache) -> dict[str, Bound]:
        """Inputs of the next step."""
        layout = self._layout
        shape = (cache.batch_size, layout.heads, self.num_slots(cache), layout.dim)
        return {PAST + name: Bound(b.address, shape) for name, b in self._sets[0].items()}

    def present(self) -> dict[str, int]:
        """Addresses of the next step's outputs."""
        return {PRESENT + name: buffer.address for name, buffer in self._sets[-1].items()}

    def advance(self) -> None:
        """A step is done: what was present is past."""
        self._sets.reverse()

    def release(self) -> None:
        """Give the memory back."""
        for buffers in self._sets:
            for buffer in buffers.values():
                self._memory.release(buffer)


class ConcatBuffers(KVBuffers):
    """Each step reads one set and writes past and new into the other."""

    num_sets = 2

    def reset(self) -> None:
        """Nothing to do: past is read as far as it is filled."""

    def num_slots(self, cache: TensorRTCache) -> int:
        """Those that are filled."""
        return cache.length


class InPlaceBuffers(KVBuffers):
    """Each step writes the new slots into the set it reads."""

    num_sets = 1

    def reset(self) -> None:
        """Zeros: slots that are not filled are masked, but 0 times NaN would be NaN."""
        device, stream = self._memory.device, self._memory.stream
        for buffer in self._sets[0].values():
            device.clear(buffer.address, buffer.num_bytes, stream)

    def num_slots(self, cache: TensorRTCache) -> int:
        """All of them, filled or not."""
        del cache
        return self._layout.capacity


CONTRACTS: Mapping[str, type[KVBuffers]] = MappingProxyType(
    {"concat": ConcatBuffers, "in_place": InPlaceBuffers}
)


def kv_layout(spec: EngineSpec, runner: EngineRunner) -> KVLayout:
    """How a decoder's engine holds its cache."""
    names = [t.name for t in spec.inputs if t.name.startswith(PAST)]
    (first, *_) = names
    _, heads, slots, dim = runner.largest(first, "decode")
    # `concat` has room for one more than the longest past: the step that follows it.
    capacity = slots + (spec.kv_contract == "concat")
    return KVLayout(
        names=tuple(name.removeprefix(PAST) for name in names),
        heads=heads,
        dim=dim,
        capacity=capacity,
        itemsize=runner.num_bytes(first, (1,)),
    )
