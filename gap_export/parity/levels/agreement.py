"""Levels ``token`` and ``box``: answers and boxes are the reference's, ties aside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from gap_export.parity.levels.answers import AnswerPair
from gap_export.parity.metrics import intersection_over_union
from gap_export.parity.results import BoxRow, LevelResult, TokenRow
from gap_export.runtime.grounding import Grounding

# All rows of a broken bundle would say the same.
MAX_ROWS = 10
_NEAR = 0.95


def judge_tokens(pairs: Sequence[AnswerPair], *, bar: float = 1.0) -> LevelResult:
    """At least a fraction ``bar`` of the questions has the same greedy tokens, or a tie."""
    # What fails the check comes first.
    differing = sorted((p for p in pairs if not p.same_tokens), key=lambda pair: pair.is_tie)
    rows = tuple(
        TokenRow(
            expression=pair.question.expression,
            step=pair.first_other_step or 1,
            margin=pair.margin,
            is_tie=pair.is_tie,
            reference=pair.expected.text,
            candidate=pair.given.text
            if isinstance(pair.given, Grounding)
            else f"error: {pair.given}",
        )
        for pair in differing[:MAX_ROWS]
    )
    return _judge("token", pairs, rows, bar=bar, same=lambda pair: pair.same_tokens, what="tokens")


def judge_boxes(pairs: Sequence[AnswerPair], *, bar: float = 1.0) -> LevelResult:
    """At least a fraction ``bar`` of the questions has the same box, or a tie."""
    ious = [_iou(pair) for pair in pairs]
    figures = {
        "mean_iou": sum(ious) / len(ious),
        "share_over_95": sum(iou > _NEAR for iou in ious) / len(ious),
    }
    differing = sorted((pair for pair in pairs if not pair.same_box), key=_iou)
    rows = tuple(
        BoxRow(
            expression=pair.question.expression,
            iou=_iou(pair),
            reference=pair.expected.box,
            candidate=pair.box,
        )
        for pair in differing[:MAX_ROWS]
    )
    return _judge(
        "box", pairs, rows, bar=bar, same=lambda pair: pair.same_box, what="box", figures=figures
    )


def _judge(
    level: Literal["token", "box"],
    pairs: Sequence[AnswerPair],
    rows: tuple[TokenRow, ...] | tuple[BoxRow, ...],
    *,
    bar: float,
    same: Callable[[AnswerPair], bool],
    what: str,
    figures: Mapping[str, float] | None = None,
) -> LevelResult:
    equal = sum(map(same, pairs))
    ties = sum(pair.is_tie and not same(pair) for pair in pairs)
    fraction = (equal + ties) / len(pairs)
    reason = (
        f"{equal + ties} of {len(pairs)} ({100 * fraction:.1f} %) have the reference's {what} or "
        f"differ by a tie; asked for {100 * bar:g} %"
    )
    passed = fraction >= bar
    return LevelResult(
        level=level,
        status="passed" if passed else "failed",
        reason="" if passed else reason,
        figures={"questions": len(pairs), "equal": equal, "ties": ties, **(figures or {})},
        rows=rows,
    )


def _iou(pair: AnswerPair) -> float:
    if pair.same_box:
        # Where both hold none there is no overlap, and no difference either.
        return 1.0
    if pair.expected.box is None or pair.box is None:
        return 0.0
    return intersection_over_union(pair.expected.box, pair.box)
