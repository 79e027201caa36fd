"""Decoding with the form ``ort``: keys and values in buffers that are written in place.

GroupQueryAttention knows of each row how many slots are filled, and nothing of hidden ones. So a
hidden token, be it padding or dropped in the middle of a prompt, is not fed at all: no query may
see it, so that leaving it out changes nothing, and it costs nothing. Rows then have lengths of
their own. Rows that are of one length, or take one token, run together; others one after another,
each in its part of the same buffers.

Shape letters: B rows, S fed tokens, T = past + S slots, P prompt tokens after pruning, V
vocabulary, A axes of a position, K key-value heads, d head width.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import UsageError
from gap_export.runtime.backends.backend import Feed, FloatArray
from gap_export.runtime.backends.quiet_onnxruntime import ort
from gap_export.spec.manifest import ORT_LOGITS

# Buffers are had in steps of so many slots, so that prompts of about one length share them.
_STEP = 16
_MASK = "attention_mask"


class KVBuffer:
    """Keys or values of one layer, [B, K, slots, d], in the memory of the CPU or of a GPU.

    Attributes:
        shape: Its own.
        dtype: Of its floats.
    """

    def __init__(self, shape: tuple[int, int, int, int], dtype: np.dtype[Any], device: str) -> None:
        self.shape, self.dtype = shape, dtype
        # What lies in unfilled slots is never looked at, so it need not be anything.
        self._host = np.empty(shape, dtype) if device == "cpu" else None
        self._value: ort.OrtValue | None = None
        if self._host is None:
            self._value = ort.OrtValue.ortvalue_from_shape_and_type(shape, dtype, device)

    def address(self, row: int) -> int:
        """Where a row begins."""
        start = self._host.ctypes.data if self._value is None else self._value.data_ptr()  # type: ignore[union-attr]
        return int(start) + row * self.dtype.itemsize * int(np.prod(self.shape[1:]))

    def read(self) -> NDArray[Any]:
        """Its numbers; of a buffer on the CPU no copy."""
        if self._host is not None:
            return self._host
        assert self._value is not None
        found: NDArray[Any] = self._value.numpy()
        return found

    def write(self, numbers: NDArray[Any]) -> None:
        """Take the numbers of :meth:`read` back, which may have been changed."""
        if self._value is not None:
            self._value.update_inplace(np.ascontiguousarray(numbers))


@dataclass
class InPlaceCache:
    """What one batch has in its buffers.

    Attributes:
        batch_size: B.
        num_slots: The most it may be fed.
        buffers: By the graph's input names.
        stored: bool [B, num_slots]: which of the fed tokens are in the buffers; the rest is hidden.
        length: Tokens fed so far, hidden ones included.
        filled: int64 [B]: slots that each row has filled.
        bindings: By first and last row, where the buffers are bound already.
    """

    batch_size: int
    num_slots: int
    buffers: Mapping[str, KVBuffer]
    stored: NDArray[np.bool_]
    length: int = 0
    filled: NDArray[np.int64] = field(init=False)
    bindings: dict[tuple[int, int], ort.IOBinding] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.filled = self.stored.sum(axis=1)

    def hide(self, hidden: NDArray[np.bool_]) -> None:
        """Take out of the buffers what is hidden from now on; bool [B, length]."""
        for row in np.flatnonzero(hidden.any(axis=1)):
            places = np.flatnonzero(self.stored[row])
            keep = np.flatnonzero(~hidden[row][places])
            # What is cut off at the end needs no moving.
            if len(keep) and keep[-1] != len(keep) - 1:
                for buffer in self.buffers.values():
                    numbers = buffer.read()
                    numbers[row, :, : len(keep)] = numbers[row][:, keep]
                    buffer.write(numbers)
            self.stored[row, places] = False
            self.stored[row, places[keep]] = True
        self.filled = self.stored.sum(axis=1)


class InPlaceDecoder:
    """Runs a decoder of the form ``ort``.

    Args:
        session: The decoder's graph.
        device: ``cpu`` or ``cuda``.
        dtypes: Those of the graph's inputs, by name.
        size: Key-value heads, how wide they are, and V.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        device: str,
        dtypes: Mapping[str, np.dtype[Any]],
        size: tuple[int, int, int],
    ) -> None:
        self._session, self._device, self._dtypes = session, device, dtypes
        self._heads, self._dim, self._vocabulary = size
        self._present = {
            name: name.replace("past_key_values.", "present.", 1)
            for name in dtypes
            if name.startswith("past_key_values.")
        }
        (logits,) = (v for v in session.get_outputs() if v.name == "logits")
        # A graph of before gives those of one token.
        self.num_logits = 1 if logits.shape[1] == 1 else ORT_LOGITS
        # Of the last cache that was dropped, by its rows and slots.
        self._spare: dict[tuple[int, int], Mapping[str, KVBuffer]] = {}

    def new_cache(self, batch_size: int, num_slots: int) -> InPlaceCache:
        """An empty cache; its buffers may be those of one that is no longer used."""
        slots = -(-num_slots // _STEP) * _STEP
        shape = batch_size, self._heads, slots, self._dim
        buffers = self._spare.pop((batch_size, slots), None) or {
            name: KVBuffer(shape, self._dtypes[name], self._device) for name in self._present
        }
        stored = np.zeros((batch_size, num_slots), dtype=np.bool_)
        cache = InPlaceCache(batch_size, num_slots, buffers, stored)
        weakref.finalize(cache, self._take_back, (batch_size, slots), buffers).atexit = False
        return cache

    def fork_cache(self, cache: InPlaceCache, batch_size: int, num_slots: int) -> InPlaceCache:
        """A cache whose rows all begin as the one row of another."""
        made = self.new_cache(batch_size, num_slots)
        filled = int(cache.filled[0])
        for name, source in cache.buffers.items():
            target = made.buffers[name]
            numbers = target.read()
            numbers[:, :, :filled] = source.read()[:, :, :filled]
            target.write(numbers)
        made.stored[:, : cache.length] = cache.stored[:, : cache.length]
        made.filled, made.length = made.stored.sum(axis=1), cache.length
        return made

    def decode(self, feed: Feed, cache: InPlaceCache) -> FloatArray:
        """The logits of each row's last token, [B, V].

        Raises:
            UsageError: more tokens than the cache was made for, a mask of another length or that
                shows again what it hid, or a last token that is hidden.
        """
        last = [logits[:, -1] for logits in self._decode(feed, cache)]
        return last[0] if len(last) == 1 else np.concatenate(last)

    def decode_each(self, feed: Feed, cache: InPlaceCache) -> FloatArray:
        """The logits of each token of the one row, [S, V]."""
        ((logits,),) = self._decode(feed, cache)
        found: FloatArray = logits
        return found

    def _decode(self, feed: Feed, cache: InPlaceCache) -> list[FloatArray]:
        """The logits of rows that ran together, each [rows, tokens, V]."""
        visible = feed[_MASK] != 0
        past, num_fed = cache.length, feed["inputs_embeds"].shape[1]
        _check_mask(visible, cache, num_fed)
        hidden = cache.stored[:, :past] & ~visible[:, :past]
        if hidden.any():
            cache.hide(hidden)
        new = visible[:, past:]
        runs = _runs(new, cache.filled)
        logits = [self._run(feed, cache, rows, fed) for rows, fed in runs]
        cache.stored[:, past : past + num_fed] = new
        cache.filled = cache.filled + new.sum(axis=1)
        cache.length += num_fed
        return logits

    def _run(
        self,
        feed: Feed,
        cache: InPlaceCache,
        rows: slice,
        fed: NDArray[np.int64],
    ) -> FloatArray:
        """Feed some rows their visible tokens, int64 [rows, tokens] of the S."""
        lengths = cache.filled[rows] + fed.shape[1]
        # What each stored token counts as, hidden ones left out; zeros behind shorter rows.
        mask = np.zeros((len(lengths), lengths.max()), dtype=np.int64)
        for target, counts in zip(mask, feed[_MASK][rows], strict=True):
            stored = counts[counts != 0]
            target[: len(stored)] = stored
        given = {name: feed[name][rows] for name in ("inputs_embeds", "position_ids")}
        if fed.shape[1] < feed["position_ids"].shape[1]:
            given = {
                name: np.stack([row[kept] for row, kept in zip(array, fed, strict=True)])
                for name, array in given.items()
            }
        given |= {"kept_positions": feed["kept_positions"][..., rows, :], _MASK: mask}
        # The binding reads these arrays in place: they must live, contiguous, until the run ends.
        held = {n: np.ascontiguousarray(a, dtype=self._dtypes[n]) for n, a in given.items()}
        binding = cache.bindings.get((rows.start, rows.stop)) or self._bind(cache, rows)
        for name, array in held.items():
            binding.bind_cpu_input(name, array)
        shape = len(lengths), min(fed.shape[1], self.num_logits), self._vocabulary
        logits = np.empty(shape, dtype=self._dtypes["inputs_embeds"])
        binding.bind_output("logits", "cpu", 0, logits.dtype, logits.shape, logits.ctypes.data)
        self._session.run_with_iobinding(binding)
        return logits

    def _bind(self, cache: InPlaceCache, rows: slice) -> ort.IOBinding:
        """Bind the buffers of some rows, once for all steps."""
        binding = self._session.io_binding()
        for name, buffer in cache.buffers.items():
            shape = (rows.stop - rows.start, *buffer.shape[1:])
            place = self._device, 0, buffer.dtype, shape, buffer.address(rows.start)
            binding.bind_input(name, *place)
            # One buffer for both: that is how the node knows that it may write in place.
            binding.bind_output(self._present[name], *place)
        cache.bindings[rows.start, rows.stop] = binding
        return binding

    def _take_back(self, size: tuple[int, int], buffers: Mapping[str, KVBuffer]) -> None:
        self._spare.clear()
        self._spare[size] = buffers


def _check_mask(visible: NDArray[np.bool_], cache: InPlaceCache, num_fed: int) -> None:
    past = cache.length
    total = past + num_fed
    if total > cache.num_slots:
        raise UsageError(
            "more tokens than the cache was made for", seen=total, allowed=f"<= {cache.num_slots}"
        )
    if visible.shape != (cache.batch_size, total):
        raise UsageError(
            "an attention mask of another size than the cache and the fed tokens",
            seen=list(visible.shape),
            allowed=f"[{cache.batch_size}, {total}]",
        )
    if (visible[:, :past] & ~cache.stored[:, :past]).any():
        raise UsageError("the attention mask shows a token that it hid before, which is not kept")
    if not visible[:, -1].all():
        raise UsageError(
            "the last token of a row is hidden, and it is the one whose logits are asked for",
            seen=f"rows {np.flatnonzero(~visible[:, -1]).tolist()}",
        )


def _runs(
    new: NDArray[np.bool_], filled: NDArray[np.int64]
) -> Iterator[tuple[slice, NDArray[np.int64]]]:
    """Rows that run together, and which of the S tokens each is fed, [rows, tokens]."""
    counts = new.sum(axis=1)

    def kind(row: int) -> tuple[int, int]:
        # Several tokens behind others are taken of one row alone.
        alone = counts[row] > 1 and filled[row] > 0
        return int(counts[row]), row if alone else -1

    for _, group in itertools.groupby(range(len(new)), key=kind):
        members = list(group)
        rows = slice(members[0], members[-1] + 1)
        yield rows, np.stack([np.flatnonzero(new[row]) for row in members])
