"""Prefill and decode latency of anything that runs a decoder, with one protocol for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gap_export.runtime.backends.backend import Backend
from gap_export.spec.manifest import Manifest
from gap_export.spec.positions import Int64Array

Feed = dict[str, Any]


class Decoder(Protocol):
    """One batch of one row, from an empty cache on."""

    def start(self, num_slots: int) -> None:
        """Forget what was fed; at most ``num_slots`` tokens follow."""
        ...

    def step(self, feed: Feed) -> None:
        """Feed some tokens and wait for the logits in the host's memory."""
        ...


@dataclass
class BackendDecoder:
    """A session's backend."""

    backend: Backend
    cache: Any = None

    def start(self, num_slots: int) -> None:
        """See Decoder."""
        self.cache = self.backend.new_cache(1, num_slots)

    def step(self, feed: Feed) -> None:
        """See Decoder."""
        self.backend.decode(feed, self.cache)


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Milliseconds, each the median of several runs after the warm-up.

    Attributes:
        first_ms: The very first prefill, with all that is compiled or allocated then.
        prefill_ms: A prompt.
        decode_ms: One token behind it.
    """

    first_ms: float
    prefill_ms: float
    decode_ms: float


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is fed: random embeddings, since latency does not depend on their values.

    Attributes:
        num_prompt_tokens: P, kept visual tokens and the text around them.
        num_new_tokens: Tokens decoded behind the prompt.
        hidden_size: H.
    """

    num_prompt_tokens: int
    num_new_tokens: int
    hidden_size: int

    @classmethod
    def of(cls, manifest: Manifest, *, num_text_tokens: int, num_new_tokens: int) -> Workload:
        """A bundle's prompt with some text."""
        return cls(
            num_prompt_tokens=manifest.pruning.num_emitted_tokens + num_text_tokens,
            num_new_tokens=num_new_tokens,
            hidden_size=manifest.decoder.hidden_size,
        )

    def feeds(self) -> list[Feed]:
        """The prompt, then one token at a time."""
        rng = np.random.default_rng(0)
        prompt = self.num_prompt_tokens
        table: Int64Array = np.arange(prompt, dtype=np.int64)[None]
        feeds = []
        for past, new in [(0, prompt), *((prompt + n, 1) for n in range(self.num_new_tokens))]:
            feeds.append(
                {
                    "inputs_embeds": rng.normal(size=(1, new, self.hidden_size)).astype(np.float32),
                    "attention_mask": np.ones((1, past + new), np.int64),
                    "position_ids": np.arange(past, past + new, dtype=np.int64)[None],
                    "kept_positions": table,
                }
            )
        return feeds


def measure(decoder: Decoder, workload: Workload, *, warm_ups: int, runs: int) -> Latency:
    """Run the workload several times.

    Args:
        decoder: What to measure.
        workload: What to feed.
        warm_ups: Runs that are not counted; TensorRT-RTX compiles kernels in the first ones.
        runs: Runs that are.
    """
    prompt, *tokens = workload.feeds()
    first_ms = 0.0
    prefills, steps = [], []
    for number in range(warm_ups + runs):
        decoder.start(workload.num_prompt_tokens + workload.num_new_tokens)
        prefill = _timed(lambda: decoder.step(prompt))
        each = [_timed(lambda token=token: decoder.step(token)) for token in tokens]
        first_ms = first_ms or prefill
        if number >= warm_ups:
            prefills.append(prefill)
            steps += each
    return Latency(
        first_ms=first_ms,
        prefill_ms=statistics.median(prefills),
        decode_ms=statistics.median(steps),
    )


def _timed(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)
