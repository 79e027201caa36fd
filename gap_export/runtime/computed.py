"""What a graph computed, looked at before anybody reads it.

A model that overflows, or an engine that was built wrongly, gives NaN, infinity, or the same number
everywhere; the greedy loop would make an ordinary answer of any of these. So all floats that leave
a graph are looked at here, in every backend; the KV cache never leaves it, and what is wrong in
there shows in the logits.

It costs nothing that can be measured: of logits only the winner is looked at, and the features of
an image, which the vision encoder worked a thousand times longer for, are read once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import ComputationError
from gap_export.spec.positions import Int64Array

_FIX = (
    "float16 overflows beyond 65504: if the bundle is float16, export with --dtype float32; "
    "gap-export check BUNDLE names the first output that is wrong"
)
_DECODER = "decoder_model_merged"
# The bits of a float16 without its sign; 65504, infinity and the NaNs are the largest, in order.
_HALF_SIZE, _HALF_MAX = np.uint16(0x7FFF), np.uint16(0x7BFF)


def choose_tokens(logits: NDArray[Any], *, step: int) -> Int64Array:
    """The token of each row with the highest logit; ties go to the lower id.

    -inf is what a graph may mask tokens with, as long as one is left.

    Args:
        logits: [B, V].
        step: Which token of the answer they choose, from 0; for the message.

    Returns:
        int64 [B].

    Raises:
        ComputationError: a row holds NaN or +inf, tops out at the last number of its dtype, is -inf
            throughout, or has the same number everywhere, masked tokens left out.
    """
    tokens: Int64Array = logits.argmax(axis=-1).astype(np.int64)
    # numpy's argmax stops at the first NaN, so looking at the winners finds any.
    best = np.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    usable = np.abs(best) < np.finfo(logits.dtype).max
    if not usable.all():
        row = int(usable.argmin())
        seen = f"{best[row]:g} for token {tokens[row]}"
        raise _error(_DECODER, "logits", f"{seen}, {_place(row, step)}")
    # A row of equals is won by the first that is not masked, so there is nothing to do for nearly
    # all rows.
    lowest = np.finfo(logits.dtype).min
    for row in np.flatnonzero((tokens == 0) | (logits[:, 0] <= lowest)).tolist():
        left = logits[row][logits[row] > lowest]
        # A mask may leave one token, or two that are equal.
        if left.size > min(2, logits.shape[-1] - 1) and (left == best[row]).all():
            seen = f"{best[row]:g} for each of {left.size} tokens, {_place(row, step)}"
            raise _error(_DECODER, "logits", seen)
    return tokens


def log_probabilities(
    logits: NDArray[Any], tokens: Int64Array, *, step: int
) -> NDArray[np.float64]:
    """Natural logarithm of the probability that a model gives to tokens: the softmax's.

    Args:
        logits: [B, V], as the model gave them; what a grammar hides counts.
        tokens: int64 [B].
        step: As of :func:`choose_tokens`.

    Returns:
        float64 [B], at most 0.

    Raises:
        ComputationError: the logits have no softmax: one is NaN or +inf.
    """
    # In float16 the sum over a vocabulary overflows.
    wide = logits.astype(np.float32, copy=False)
    best = wide.max(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        below = wide - best
    chosen = np.take_along_axis(below, tokens[:, None], axis=-1)[:, 0]
    # The most likely token adds 1, so that the sum is never 0.
    found: NDArray[np.float64] = chosen - np.log(np.exp(below).sum(axis=-1, dtype=np.float64))
    if not np.isfinite(found).all():
        row = int(np.isfinite(found).argmin())
        raise _error(_DECODER, "logits", f"{best[row, 0]:g} at most, {_place(row, step)}")
    return found


def check_computed(
    values: NDArray[Any], *, graph: str, output: str, may_be_constant: bool = False
) -> None:
    """Refuse floats that nothing can be read from.

    Args:
        values: [B, ...].
        graph: Component that gave them.
        output: Name of the output.
        may_be_constant: Whether a row may hold one number alone: scores of an image that looks the
            same everywhere do, and so may the embedding of one token, such as padding.

    Raises:
        ComputationError: NaN, an infinity, the last number of float16, which is what some hardware
            makes of one, or a constant row where there is none.
    """
    if values.dtype == np.float16:
        # By its bits: numpy's own test of float16 takes fifteen times as long.
        is_finite = (values.view(np.uint16) & _HALF_SIZE).max(initial=0) < _HALF_MAX
    else:
        is_finite = np.isfinite(values).all()
    if not is_finite:
        usable = np.abs(values) < np.finfo(values.dtype).max
        place = tuple(np.argwhere(~usable)[0].tolist())
        raise _error(graph, output, f"{values[place]:g} at {list(place)}")
    if may_be_constant or values[0].size < 2:
        return
    for row, of_row in enumerate(values):
        first = of_row.flat[0]
        if first == of_row.flat[-1] and (of_row == first).all():
            raise _error(graph, output, f"{first:g} everywhere, in row {row}")


def _place(row: int, step: int) -> str:
    return f"row {row}, at step {step}"


def _error(graph: str, output: str, seen: str) -> ComputationError:
    return ComputationError(
        f"{graph} gives {output} that cannot be right",
        seen=seen,
        allowed="finite numbers that are not all the same",
        fix=_FIX,
    )
