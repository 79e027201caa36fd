"""Decoding with a cache gives what one prefill without it gives.

What is compared step by step has the same cache on both sides, and what is wrong with that (another
layer's, keys for values, ids or a mask that a step does not read) is wrong on both alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gap_export.parity.replay import Call
from gap_export.parity.results import TensorRow
from gap_export.parity.tally import Pair, tensor_row
from gap_export.runtime.backends.backend import Backend
from gap_export.spec.tolerances import Tolerance


def uncached_row(pairs: Sequence[Pair], tolerance: Tolerance) -> TensorRow:
    """The verdict.

    Args:
        pairs: Logits [B, V] of a prefill of all tokens, and of the last decode step; at least one.
        tolerance: The tolerance of logits.
    """
    row = tensor_row("decoder_model_merged", "logits (cached)", pairs, tolerance)
    if row.passed:
        return row
    reason = f"the reference's decoding with a cache is not its prefill without: {row.reason}"
    return replace(row, reason=reason)


def decode_uncached(backend: Backend, calls: Sequence[Call]) -> Pair | None:
    """Feed a decoder in one call what it was fed in several.

    Args:
        backend: What was asked; its last cache is of no use afterwards.
        calls: The calls of one question, in order.

    Returns:
        Logits [B, V] of that call, and those of the last step; None where there was no step.
    """
    steps = [call for call in calls if call.is_decode]
    if len(steps) < 2:
        return None
    last = steps[-1]
    embeds = np.concatenate([step.inputs["inputs_embeds"] for step in steps], axis=1)
    slots = np.concatenate([step.inputs["position_ids"] for step in steps], axis=1)
    feed = {**last.inputs, "inputs_embeds": embeds, "position_ids": slots}
    cache = backend.new_cache(*embeds.shape[:2])
    return backend.decode(feed, cache), last.outputs["logits"]
