"""Level ``token``: greedy tokens are the same, but for ties."""

from __future__ import annotations

from collections.abc import Sequence

from gap_export.parity.levels.answers import AnswerPair, share_text
from gap_export.parity.results import LevelResult, TokenRow
from gap_export.runtime.grounding import Grounding

# All rows of a broken bundle would say the same.
MAX_ROWS = 10


def judge_tokens(pairs: Sequence[AnswerPair], *, bar: float = 1.0) -> LevelResult:
    """As many questions as asked for have the same tokens, or differ where rounding decides.

    Args:
        pairs: At least one.
        bar: Share of the questions, in 0..1.
    """
    equal = sum(pair.same_tokens for pair in pairs)
    ties = sum(pair.is_tie for pair in pairs)
    passed = (equal + ties) / len(pairs) >= bar
    differing = [pair for pair in pairs if not pair.same_tokens]
    # What fails the check comes first.
    differing.sort(key=lambda pair: pair.is_tie)
    return LevelResult(
        level="token",
        status="passed" if passed else "failed",
        reason=""
        if passed
        else f"{share_text(equal + ties, len(pairs))} have the reference's tokens or differ by a "
        f"tie; asked for {100 * bar:g} %",
        figures={"questions": len(pairs), "equal": equal, "ties": ties},
        rows=tuple(map(_row, differing[:MAX_ROWS])),
    )


def _row(pair: AnswerPair) -> TokenRow:
    step = pair.first_other_step
    assert step is not None, "only of pairs that differ"
    given = pair.given
    return TokenRow(
        expression=pair.question.expression,
        step=step,
        margin=pair.margin,
        is_tie=pair.is_tie,
        reference=pair.expected.text,
        candidate=given.text if isinstance(given, Grounding) else f"error: {given}",
    )
