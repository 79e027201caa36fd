"""Decoding with a graph whose cache grows: each step gives all keys and values anew.

They stay where they were computed: a step's ``present`` outputs are bound as the next step's
``past`` inputs, without a copy through numpy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gap_export.runtime.backends.backend import BAKED, Feed, FloatArray
from gap_export.runtime.backends.quiet_onnxruntime import ort


@dataclass
class GrowingCache:
    """Keys and values as ONNX Runtime holds them.

    Attributes:
        batch_size: B.
        length: Slots filled.
        values: past_key_values.{i}.key|value by input name, [B, heads, length, dim].
    """

    batch_size: int
    length: int = 0
    values: dict[str, ort.OrtValue] = field(default_factory=dict)


class GrowingDecoder:
    """Runs a decoder with ``past`` and ``present`` of the lengths before and after a step.

    Args:
        session: The decoder's graph; logits come first among its outputs.
        device: ``cpu`` or ``cuda``.
        dtypes: Those of the graph's inputs, by name.
        size: Key-value heads, and how wide they are.
    """

    num_logits = 1

    def __init__(
        self,
        session: ort.InferenceSession,
        device: str,
        dtypes: Mapping[str, np.dtype[Any]],
        size: tuple[int, int],
    ) -> None:
        self._session, self._device, self._dtypes, self._size = session, device, dtypes, size
        self._past = {
            value.name.replace("present.", "past_key_values.", 1): value.name
            for value in session.get_outputs()
            if value.name.startswith("present.")
        }

    def new_cache(self, batch_size: int, num_slots: int) -> GrowingCache:
        """An empty cache; each step makes its values anew, so no memory is had ahead."""
        del num_slots
        heads, dim = self._size
        return GrowingCache(
            batch_size=batch_size,
            values={
                name: ort.OrtValue.ortvalue_from_numpy(
                    np.zeros((batch_size, heads, 0, dim), dtype=self._dtypes[name]), self._device
                )
                for name in self._past
            },
        )

    def fork_cache(self, cache: GrowingCache, batch_size: int, num_slots: int) -> GrowingCache:
        """Rows that begin as one; a single row shares the values, which no step writes to."""
        del num_slots
        values = dict(cache.values)
        if batch_size > 1:
            for name, value in values.items():
                rows = np.repeat(value.numpy(), batch_size, axis=0)
                values[name] = ort.OrtValue.ortvalue_from_numpy(rows, self._device)
        return GrowingCache(batch_size=batch_size, length=cache.length, values=values)

    def decode(self, feed: Feed, cache: GrowingCache) -> FloatArray:
        """The logits of each row's last token, [B, V]."""
        binding = self._session.io_binding()
        # The binding reads these arrays in place: they must live, contiguous, until the run ends.
        held = {
            name: np.ascontiguousarray(array, dtype=self._dtypes[name])
            for name, array in feed.items()
            if name in self._dtypes or name != BAKED
        }
        for name, array in held.items():
            binding.bind_cpu_input(name, array)
        for name, value in cache.values.items():
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in self._past.values():
            binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        cache.values = dict(zip(self._past, present, strict=True))
        cache.length += feed["inputs_embeds"].shape[1]
        last: FloatArray = logits.numpy()[:, -1].copy()
        return last
