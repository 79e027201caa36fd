"""Greedy decoding of answers whose syntax is rigid: several tokens a step, the result unchanged.

Of ``[0.25, 0.50, 0.75, 0.60]`` only the digits say anything. What stands between them is the same
in each answer of a model, so it is fed in one step with the token before it, and the logits show
whether the model would have chosen it. The first token that it would not have chosen, and those
behind it, are hidden by the mask, as if they had never been fed.

That is speculative decoding (arXiv 2211.17192) with the model's earlier answers as the draft.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from gap_export.runtime.backends.backend import Backend, FloatArray, KVCache
from gap_export.runtime.computed import choose_tokens, log_probabilities
from gap_export.runtime.generation import DecoderPrompt, Generation, embed_tokens

# Slots for tokens that were fed and turn out to be others; where they are used up, none is guessed.
_SPARE_SLOTS = 16
# Beginnings of answers that are remembered; a model with a syntax needs some dozens.
_MAX_BEGINNINGS = 4096
_ANY_NUMBER = -1


class ExpectedTokens:
    """What answers of one model go on with, learnt from those it gave; threads may share it.

    Beginnings are told apart by their tokens, all tokens with a digit counting as the same one.

    Args:
        has_digit: Whether a token holds one.
    """

    def __init__(self, has_digit: Callable[[int], bool]) -> None:
        self._has_digit = has_digit
        # By beginning: the token that came next, and in how many answers in a row it did.
        self._next: dict[tuple[int, ...], tuple[int, int]] = {}
        self._lock = threading.Lock()

    def learn(self, answer: Sequence[int]) -> None:
        """Remember an answer's tokens."""
        beginning: tuple[int, ...] = ()
        with self._lock:
            if len(self._next) > _MAX_BEGINNINGS:
                self._next.clear()
            for token in answer:
                known, times = self._next.get(beginning, (token, 0))
                self._next[beginning] = token, times + 1 if token == known else 1
                beginning = (*beginning, self._kind(token))

    def guess(self, answer: Sequence[int], most: int) -> list[int]:
        """The tokens that are expected behind those of an answer, ``most`` of them at most."""
        beginning = tuple(self._kind(token) for token in answer)
        found: list[int] = []
        while len(found) < most:
            token, times = self._next.get(beginning, (0, 0))
            # A digit is expected where it was the same twice, as that before a decimal point.
            if not times or times < 1 + self._has_digit(token):
                break
            found.append(token)
            beginning = (*beginning, self._kind(token))
        return found

    def _kind(self, token: int) -> int:
        return _ANY_NUMBER if self._has_digit(token) else token


def generate_expecting(
    backend: Backend,
    prompt: DecoderPrompt,
    expected: ExpectedTokens,
    *,
    max_new_tokens: int,
    eos_token_ids: Sequence[int],
    prefix: KVCache | None = None,
) -> Generation:
    """What :func:`gap_export.runtime.generation.generate` gives for one row, in fewer steps.

    Args:
        backend: With ``num_logits`` above 1.
        prompt: Of one row.
        expected: What is guessed; this answer is not learnt.
        max_new_tokens: As of ``generate``, and likewise the rest.
        eos_token_ids: See ``generate``.
        prefix: See ``generate``.

    Raises:
        ComputationError: see ``generate``.
    """
    length = prompt.attention_mask.shape[1]
    num_slots = length + max_new_tokens + _SPARE_SLOTS
    mask = np.ones((1, num_slots), dtype=np.int64)
    mask[:, :length] = prompt.attention_mask
    first_slot = int(prompt.position_ids[0, -1]) + 1
    started = time.perf_counter()
    cache = (
        backend.new_cache(1, num_slots)
        if prefix is None
        else backend.fork_cache(prefix, 1, num_slots)
    )
    answer: list[int] = []
    likely: list[float] = []

    def take(logits: FloatArray) -> None:
        tokens = choose_tokens(logits, step=len(answer))
        likely.extend(log_probabilities(logits, tokens, step=len(answer)).tolist())
        answer.extend(tokens.tolist())

    take(backend.decode(prompt.feed, cache))
    first_done = time.perf_counter()
    num_spare = _SPARE_SLOTS
    while len(answer) < max_new_tokens and answer[-1] not in eos_token_ids:
        # Tokens that end an answer are never fed, nor is the last one there is room for.
        most = min(backend.num_logits - 1, max_new_tokens - len(answer) - 1, num_spare)
        guessed = [t for t in expected.guess(answer, most) if t not in eos_token_ids]
        fed = np.array([[answer[-1], *guessed]], dtype=np.int64)
        end = length + fed.shape[1]
        feed = {
            "inputs_embeds": embed_tokens(backend, fed, may_be_constant=True),
            "attention_mask": mask[:, :end],
            "position_ids": first_slot + len(answer) - 1 + np.arange(fed.shape[1])[None],
            "kept_positions": prompt.id_table,
        }
        logits = backend.decode_each(feed, cache) if guessed else backend.decode(feed, cache)
        num_right = _num_right(logits, guessed)
        take(logits[: num_right + 1])
        mask[:, length + 1 + num_right : end] = 0
        num_spare -= len(guessed) - num_right
        length = end
    return Generation(
        token_ids=(tuple(answer),),
        log_probabilities=(tuple(likely),),
        logits=None,
        prefill_ms=1e3 * (first_done - started),
        decode_ms=1e3 * (time.perf_counter() - first_done),
    )


def _num_right(logits: FloatArray, guessed: Sequence[int]) -> int:
    """How many of the guessed tokens the logits before each of them choose, up to the first not."""
    chosen = logits[: len(guessed)].argmax(axis=-1).tolist()
    right = [token == guess for token, guess in zip(chosen, guessed, strict=True)]
    return right.index(False) if False in right else len(right)
