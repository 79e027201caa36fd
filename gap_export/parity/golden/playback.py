"""A golden holds together: asked again, its own arrays give its own answers.

The session that recorded it is run once more, on a backend that gives what was recorded and sees
that it is asked what was recorded. Whatever follows from something else in a golden (pixels, ids,
tokens, texts, boxes, kept tokens) is so worked out anew, by the code that worked it out before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.bundle import Bundle
from gap_export.errors import GapExportError, UsageError
from gap_export.parity.golden.format import RECORD_AGAIN, without_scores
from gap_export.parity.golden.opening import Golden
from gap_export.parity.replay import Call
from gap_export.runtime.backend import EncodedImage, FloatArray, KVCache, ScoredImage
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import QuantizationSpec, from_plain, to_plain
from gap_export.spec.positions import Int64Array

# Two machines may resize a picture to values one level of 255 apart, which the deviation of a
# colour makes larger.
_PIXEL_ATOL = 0.05
# What each run has anew.
_OF_THE_RUN = frozenset({"timings_ms"})


def check_holds_together(golden: Golden, bundle: Bundle) -> None:
    """Play a golden's session once more.

    Args:
        golden: An opened one.
        bundle: What it was opened for; its tokenizers are read.

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
            _check_answer(number, expected, given)


class _TornError(UsageError):
    """A golden that contradicts itself."""


def _torn(seen: str) -> _TornError:
    return _TornError(
        "the golden does not hold together",
        seen=seen,
        allowed="what follows from the arrays that were recorded",
        fix=RECORD_AGAIN,
    )


def _check_answer(number: int, expected: Grounding, given: Grounding) -> None:
    # Through JSON, as the recorded one went.
    played = from_plain(Grounding, to_plain(without_scores(given)), where="the answer")
    for field in fields(Grounding):
        recorded, right = getattr(expected, field.name), getattr(played, field.name)
        if field.name not in _OF_THE_RUN and recorded != right:
            raise _torn(
                f"question {number}: {field.name} of the answer is {recorded!r}, and what was "
                f"recorded gives {right!r}"
            )


class _Cache:
    """Stands for a cache, which nobody looks into."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.length = 0


class _Playback:
    """A backend that gives what was recorded, and refuses to be asked anything else."""

    def __init__(self, golden: Golden) -> None:
        self.name = golden.spec.reference
        self.dtype = golden.dtype
        self.quantization: QuantizationSpec | None = golden.quantization
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
            raise _torn(f"question {self._number}: call {left[0]} ({left[1].method}) is one more")

    def __enter__(self) -> _Playback:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing to free."""

    def encode_text(self, input_ids: Int64Array) -> FloatArray:
        """See Backend."""
        return self._give("encode_text", input_ids=input_ids)["text_embeds"]

    def encode_image(
        self, pixel_values: NDArray[np.float32], text_embeds: FloatArray | None
    ) -> EncodedImage:
        """See Backend."""
        found = self._give("encode_image", pixel_values=pixel_values, text_embeds=text_embeds)
        return EncodedImage(**found)

    def score_tokens(
        self, pixel_values: NDArray[np.float32], text_embeds: FloatArray | None
    ) -> ScoredImage:
        """See Backend."""
        found = self._give("score_tokens", pixel_values=pixel_values, text_embeds=text_embeds)
        return ScoredImage(**found)

    def prune_tokens(self, scored: ScoredImage, *, num_kept_tokens: int) -> EncodedImage:
        """See Backend."""
        number = np.asarray(num_kept_tokens)
        return EncodedImage(
            **self._give("prune_tokens", **scored._asdict(), num_kept_tokens=number)
        )

    def image_newline(self) -> FloatArray:
        """See Backend."""
        return self._give("image_newline")["image_newline"]

    def embed_tokens(self, input_ids: Int64Array) -> FloatArray:
        """See Backend."""
        return self._give("embed_tokens", input_ids=input_ids)["inputs_embeds"]

    def new_cache(self, batch_size: int) -> _Cache:
        """See Backend."""
        self._give("new_cache", batch_size=np.asarray(batch_size))
        return _Cache(batch_size)

    def decode(
        self,
        *,
        inputs_embeds: FloatArray,
        attention_mask: Int64Array,
        position_ids: Int64Array,
        kept_positions: Int64Array,
        cache: KVCache,
    ) -> FloatArray:
        """See Backend."""
        del cache
        return self._give(
            "decode",
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            kept_positions=kept_positions,
        )["logits"]

    def _give(self, method: str, **asked: NDArray[Any] | None) -> dict[str, NDArray[Any]]:
        place, call = next(self._calls, (0, None))
        where = f"question {self._number}, call {place}"
        if call is None or call.method != method:
            recorded = "the end" if call is None else call.method
            raise _torn(f"{where}: {recorded}, where a session asks for {method}")
        for name, value in asked.items():
            if not _same(name, call.inputs[name], value):
                raise _torn(f"{where} ({method}): {name} is not what a session gives it")
        if call.margins is not None and not _are_margins(call.margins, call.outputs):
            raise _torn(f"{where} ({method}): margins {call.margins.tolist()[:4]}")
        return call.outputs


def _same(name: str, recorded: NDArray[Any] | None, asked: NDArray[Any] | None) -> bool:
    if recorded is None or asked is None:
        return recorded is asked
    if recorded.shape != asked.shape or recorded.dtype != asked.dtype:
        return False
    if name == "pixel_values":
        return bool(np.allclose(recorded, asked, rtol=0.0, atol=_PIXEL_ATOL))
    return np.array_equal(recorded, asked)


def _are_margins(margins: NDArray[Any], outputs: dict[str, NDArray[Any]]) -> bool:
    """One for each row; by how much a choice was decided is not below 0."""
    return len(margins) == len(outputs["keep_indices"]) and bool((margins >= 0).all())
