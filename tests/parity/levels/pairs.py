"""Pairs of made-up answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gap_export.errors import GapExportError
from gap_export.parity.levels.answers import AnswerPair
from gap_export.parity.question import Question
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.images.geometry import Box
from gap_export.spec.tolerances import TOLERANCES

BOX: Box = (10.0, 10.0, 50.0, 50.0)
EOS = 2


def answer(
    token_ids: Sequence[int] = (0, EOS), keep: Sequence[int] = (0, 3), box: Box | None = BOX
) -> Grounding:
    return Grounding(
        expression="the dog",
        box=box,
        text=" ".join(map(str, token_ids)),
        token_ids=tuple(token_ids),
        keep_indices=tuple(keep),
        num_visual_tokens=16,
        tokens=(),
        image_size=(96, 96),
        timings_ms={},
        backend="numpy",
        warnings=(),
    )


def pair(
    expected: Grounding,
    given: Grounding | GapExportError,
    logits: Sequence[Any] = (),
    *,
    dtype: str = "float32",
    truth: Box | None = None,
) -> AnswerPair:
    image = np.zeros((96, 96, 3), np.uint8)
    return AnswerPair(
        question=Question(image=image, expression="the dog", box=truth),
        expected=expected,
        given=given,
        logits=list(logits),
        tolerances=TOLERANCES[dtype],
    )


def same(truth: Box | None = None) -> AnswerPair:
    return pair(answer(), answer(), truth=truth)


def other(truth: Box | None = None, box: Box | None = None) -> AnswerPair:
    """Clearly another answer."""
    return pair(answer(), answer((1, EOS), box=box), [[9.0, 1.0, 0.0]], truth=truth)


def tie() -> AnswerPair:
    """An answer that parts where the reference is undecided."""
    logits = np.asarray([9.0, 9.0 - 1e-5, 0.0], np.float64)
    return pair(answer(), answer((1, EOS), box=None), [logits])
