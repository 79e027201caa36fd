"""Two answers to one question, and whether rounding alone explains where they part."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import GapExportError
from gap_export.parity.question import Question
from gap_export.parity.replay import Call
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.images.geometry import Box
from gap_export.spec.tolerances import Tolerance


@dataclass(frozen=True, kw_only=True)
class AnswerPair:
    """What reference and candidate say to one question.

    Attributes:
        question: What was asked.
        expected: The reference's answer.
        given: The candidate's, or why there is none: the reference could answer, so that is a
            finding and not a failed check.
        logits: The reference's [V] at each step.
        tolerances: By name of output, of the dtype both compute in.
        has_tie: Whether the reference's own choice of visual tokens was a tie.
    """

    question: Question
    expected: Grounding
    given: Grounding | GapExportError
    logits: Sequence[NDArray[Any]]
    tolerances: Mapping[str, Tolerance]
    has_tie: bool = False

    @classmethod
    def of_calls(
        cls,
        question: Question,
        expected: Grounding,
        given: Grounding | GapExportError,
        calls: Sequence[Call],
        tolerances: Mapping[str, Tolerance],
    ) -> AnswerPair:
        """With the logits and margins of the reference's recorded calls."""
        margins = [float(call.margins.min()) for call in calls if call.margins is not None]
        return cls(
            question=question,
            expected=expected,
            given=given,
            logits=[call.outputs["logits"][0] for call in calls if call.is_decode],
            tolerances=tolerances,
            has_tie=min(margins, default=math.inf) <= tolerances["keep_indices"].tie_margin,
        )

    @property
    def same_tokens(self) -> bool:
        """Whether the greedy tokens are the same to the last."""
        return self.first_other_step is None

    @property
    def box(self) -> Box | None:
        """The candidate's box."""
        return self.given.box if isinstance(self.given, Grounding) else None

    @property
    def same_box(self) -> bool:
        """Whether the boxes are the same, or both answers hold none."""
        # Boxes come from text of the same tokens, so nothing but an exact match is agreement.
        return isinstance(self.given, Grounding) and self.expected.box == self.given.box

    @property
    def first_other_step(self) -> int | None:
        """The first token that differs, counted from 1; None where none does."""
        if not isinstance(self.given, Grounding):
            return 1
        pairs = zip_longest(self.expected.token_ids, self.given.token_ids)
        return next((n for n, (mine, other) in enumerate(pairs, start=1) if mine != other), None)

    @property
    def margin(self) -> float | None:
        """By how much the reference preferred its token where the two part.

        None where they do not part, where one answer goes on and the other has ended, and where
        there is no answer.
        """
        step = self.first_other_step
        if step is None or not isinstance(self.given, Grounding):
            return None
        mine, other = self.expected.token_ids, self.given.token_ids
        if step > min(len(mine), len(other), len(self.logits)):
            return None
        logits = self.logits[step - 1]
        return float(logits[mine[step - 1]]) - float(logits[other[step - 1]])

    @property
    def is_tie(self) -> bool:
        """Whether the two differ where rounding decides, of the answer or of the visual tokens."""
        if not isinstance(self.given, Grounding) or self.same_tokens:
            return False
        kept, given = set(self.expected.keep_indices), set(self.given.keep_indices)
        num_changed = max(len(kept - given), len(given - kept))
        selected = self.tolerances["keep_indices"]
        if self.has_tie:
            max_changed = selected.max_changed_in_tie(len(kept))
        elif selected.max_changed_fraction > 0:
            max_changed = max(1, int(selected.max_changed_fraction * len(kept)))
        else:
            max_changed = 0
        return 0 < num_changed <= max_changed or self._is_undecided

    @property
    def _is_undecided(self) -> bool:
        """The reference's two logits are no further apart than two logits may be off.

        A token that its own logits do not prefer it did not choose: that is no tie.
        """
        step = self.first_other_step
        if step is None or self.margin is None:
            return False
        at_that_step = self.logits[step - 1]
        if at_that_step[self.expected.token_ids[step - 1]] != np.max(at_that_step):
            return False
        largest = max((float(np.abs(logits).max()) for logits in self.logits), default=0.0)
        tolerance = self.tolerances.get("answer_logits", self.tolerances["logits"])
        return self.margin <= 2 * tolerance.absolute(largest)
