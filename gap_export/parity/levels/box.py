"""Level ``box``: boxes are where the reference's are."""

from __future__ import annotations

from collections.abc import Sequence

from gap_export.parity.levels.answers import AnswerPair, share_text
from gap_export.parity.levels.token import MAX_ROWS
from gap_export.parity.metrics import intersection_over_union
from gap_export.parity.results import BoxRow, LevelResult

_NEAR = 0.95


def judge_boxes(pairs: Sequence[AnswerPair], *, bar: float = 1.0) -> LevelResult:
    """As many questions as asked for have the same box, or tokens that part where rounding decides.

    Args:
        pairs: At least one.
        bar: Share of the questions, in 0..1.
    """
    equal = sum(pair.same_box for pair in pairs)
    ties = sum(pair.is_tie and not pair.same_box for pair in pairs)
    ious = [_iou(pair) for pair in pairs]
    passed = (equal + ties) / len(pairs) >= bar
    differing = [pair for pair in pairs if not pair.same_box]
    differing.sort(key=_iou)
    return LevelResult(
        level="box",
        status="passed" if passed else "failed",
        reason=""
        if passed
        else f"{share_text(equal + ties, len(pairs))} have the reference's box or differ by a tie; "
        f"asked for {100 * bar:g} %",
        figures={
            "questions": len(pairs),
            "equal": equal,
            "ties": ties,
            "mean_iou": sum(ious) / len(ious),
            "share_over_95": sum(iou > _NEAR for iou in ious) / len(ious),
        },
        rows=tuple(
            BoxRow(
                expression=pair.question.expression,
                iou=_iou(pair),
                reference=pair.expected.box,
                candidate=pair.box,
            )
            for pair in differing[:MAX_ROWS]
        ),
    )


def _iou(pair: AnswerPair) -> float:
    if pair.same_box:
        # Where both hold none there is no overlap, and no difference either.
        return 1.0
    if pair.expected.box is None or pair.box is None:
        return 0.0
    return intersection_over_union(pair.expected.box, pair.box)
