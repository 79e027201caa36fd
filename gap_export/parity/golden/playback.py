"""A golden holds together: asked again, its own arrays give its own answers.

The session that recorded it is run once more, on a backend that gives what was recorded and sees
that it is asked what was recorded. What follows from something else in a golden (pixels, ids,
tokens, texts, boxes, kept tokens) is so worked out anew, by the code that worked it out before.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle import Bundle
from gap_export.errors import GapExportError, UsageError
from gap_export.parity.golden.format import RECORD_AGAIN, without_scores
from gap_export.parity.golden.opening import Golden
from gap_export.parity.replay import NEW_CACHE, Call
from gap_export.runtime.backends.backend import DECODER, Backend, Feed, FloatArray, KVCache, Outputs
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import from_plain, to_plain

# Two machines may resize an image to values one level of 255 apart, which the deviation of a
# color makes larger.
_PIXEL_ATOL = 0.05
# And numpy's exponential of float32, which scores are made of, ends in other bits on another
# processor: by some 1e-7 of the probability of each token, so an answer of 50 tokens by 5e-6.
_SCORE_RTOL = 1e-5
# What each run has anew.
_OF_THE_RUN = frozenset({"timings_ms"})


def check_holds_together(golden: Golden, bundle: Bundle) -> None:
    """Play a golden's session once more.

    Raises:
        UsageError: what is recorded does not follow from what else is.
    """
    backend = _Playback(golden)
    with GroundingSession(bundle.manifest, bundle.path, backend) as session:
        for number, (question, expected) in enumerate(
            zip(golden.questions, golden.answers, strict=True), start=1
        ):
            backend.start(number, golden.calls[number - 1])
            try:
                given = session.ground(question.image, question.expression)
            except _TornError:
                raise
            except GapExportError as err:
                raise _torn(f"question {number}: {err}") from err
            backend.finish()
            # Through JSON, as the recorded one went.
            played = from_plain(Grounding, to_plain(without_scores(given)), where="the answer")
            for field in fields(Grounding):
                recorded, right = getattr(expected, field.name), getattr(played, field.name)
                if field.name not in _OF_THE_RUN and not agree(field.name, recorded, right):
                    raise _torn(
                        f"question {number}: {field.name} of the answer is {recorded!r}, and what "
                        f"was recorded gives {right!r}"
                    )


def agree(field: str, recorded: Any, played: Any) -> bool:
    """Whether a field of an answer is the recorded one: scores up to rounding."""
    if field == "score":
        if recorded is None or played is None:
            return recorded is played
        return math.isclose(recorded, played, rel_tol=_SCORE_RTOL)
    if field == "boxes":
        return len(recorded) == len(played) and all(
            replace(one, score=None) == replace(other, score=None)
            and agree("score", one.score, other.score)
            for one, other in zip(recorded, played, strict=True)
        )
    return bool(recorded == played)


class _TornError(UsageError):
    """A golden that contradicts itself."""


def _torn(seen: str) -> _TornError:
    return _TornError(
        "the golden does not hold together",
        seen=seen,
        allowed="what follows from the arrays that were recorded",
        fix=f"see which of the two is wrong, the golden or this gap-export; then {RECORD_AGAIN}",
    )


class _Playback(Backend):
    """A backend that gives what was recorded, and refuses to be asked anything else."""

    def __init__(self, golden: Golden) -> None:
        self.name = golden.spec.reference
        self.dtype, self.quantization = golden.spec.dtype, golden.spec.quantization
        self._number = 0
        self._calls: Iterator[tuple[int, Call]] = iter(())

    def start(self, number: int, calls: Sequence[Call]) -> None:
        """The calls of one question."""
        self._number = number
        self._calls = iter(enumerate(calls, start=1))

    def finish(self) -> None:
        """See that all of them were asked for."""
        left = next(self._calls, None)
        if left is not None:
            number, call = left
            raise _torn(f"question {self._number}: call {number} ({call.component}) is one more")

    def run(self, component: str, feed: Feed) -> Outputs:
        """See Backend."""
        return self._give(component, feed)

    def new_cache(self, batch_size: int, num_slots: int) -> KVCache:
        """See Backend; it is never looked into."""
        del num_slots
        self._give(NEW_CACHE, {"batch_size": np.array([batch_size], dtype=np.int64)})
        return SimpleNamespace(batch_size=batch_size, length=0)

    def decode(self, feed: Feed, cache: KVCache) -> FloatArray:
        """See Backend."""
        del cache
        return self._give(DECODER, feed)["logits"]

    def _give(self, component: str, feed: Feed) -> Outputs:
        place, call = next(self._calls, (0, None))
        where = f"question {self._number}, call {place}"
        if call is None or call.component != component:
            recorded = "the end" if call is None else call.component
            raise _torn(f"{where}: {recorded}, where a session asks for {component}")
        for name in sorted(feed.keys() | call.inputs.keys()):
            if not _same(name, call.inputs.get(name), feed.get(name)):
                raise _torn(f"{where} ({component}): {name} is not what a session gives it")
        margins = call.margins
        # One for each row; by how much a choice was decided is not below 0.
        if margins is not None and not (
            len(margins) == len(call.outputs["keep_indices"]) and (margins >= 0).all()
        ):
            raise _torn(f"{where} ({component}): margins {margins.tolist()[:4]}")
        return call.outputs


def _same(name: str, recorded: NDArray[Any] | None, asked: NDArray[Any] | None) -> bool:
    if recorded is None or asked is None:
        return recorded is asked
    if recorded.shape != asked.shape or recorded.dtype != asked.dtype:
        return False
    if name == "pixel_values":
        return bool(np.allclose(recorded, asked, rtol=0.0, atol=_PIXEL_ATOL))
    return np.array_equal(recorded, asked)
