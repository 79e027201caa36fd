"""Rows of a padded batch give what each gives alone.

Questions are asked one by one, so that no padding is ever seen: a decoder that does not read its
mask, or mixes rows, would answer all of them rightly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.parity.replay import Call
from gap_export.parity.tally import Pair
from gap_export.runtime.backends.backend import Backend, FloatArray
from gap_export.spec.positions import Int64Array, slots_from_mask, stack_tables

# Slots of padding of the longest row.
_PADDING = 2


def decode_padded(backend: Backend, questions: Sequence[Sequence[Call]]) -> list[Pair]:
    """Ask two questions at a time, of different lengths if there are such.

    Padding holds vectors that would change the answer, were they seen.

    Args:
        backend: The candidate; it takes two rows.
        questions: Recorded calls of each, at least one; a single one is asked twice.

    Returns:
        Recorded and given logits [2, V] of prefill and, where both have one, of the first step.
    """
    first, *more = ([call for call in calls if call.is_decode] for calls in questions)
    longer = (row for row in more if _length(row) != _length(first))
    rows = [first, next(longer, more[0] if more else first)]
    embeds, mask = _pad(
        *([_input(row[0], name) for row in rows] for name in ("inputs_embeds", "attention_mask"))
    )
    slots = slots_from_mask(mask)
    table = stack_tables([_table(row[0]) for row in rows])
    num_steps = min(2, *map(len, rows))
    cache = backend.new_cache(len(rows), mask.shape[1] + num_steps - 1)
    pairs: list[Pair] = []
    for step in range(num_steps):
        if step:
            embeds = np.stack([_input(row[step], "inputs_embeds") for row in rows])
            mask = np.concatenate([mask, np.ones((len(rows), 1), np.int64)], axis=1)
            slots = slots[:, -1:] + 1
        feed = {
            "inputs_embeds": embeds,
            "attention_mask": mask,
            "position_ids": slots,
            "kept_positions": table,
        }
        given = backend.decode(feed, cache)
        pairs.append((np.concatenate([row[step].outputs["logits"] for row in rows]), given))
    return pairs


def _length(calls: Sequence[Call]) -> int:
    return len(_input(calls[0], "inputs_embeds"))


def _input(call: Call, name: str) -> NDArray[Any]:
    """An input of the one row that was asked."""
    row: NDArray[Any] = call.inputs[name][0]
    return row


def _table(call: Call) -> Int64Array:
    """Ids of the one row that was asked, [P] or [A, P]."""
    table: Int64Array = call.inputs["kept_positions"][..., 0, :]
    return table


def _pad(rows: Sequence[FloatArray], masks: Sequence[Int64Array]) -> tuple[FloatArray, Int64Array]:
    """Rows [n, H] as [B, P, H], padded on the left by their own vectors turned around, and mask."""
    length = _PADDING + max(map(len, rows))
    mask = np.zeros((len(rows), length), dtype=np.int64)
    padded = []
    for index, row in enumerate(rows):
        mask[index, length - len(row) :] = masks[index]
        padded.append(
            np.concatenate([np.resize(-row[::-1], (length - len(row), row.shape[1])), row])
        )
    return np.stack(padded), mask
