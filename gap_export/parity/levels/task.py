"""Level ``task``: the candidate finds as many objects as the reference does."""

from __future__ import annotations

from collections.abc import Sequence

from gap_export.parity.levels.answers import AnswerPair
from gap_export.parity.metrics import intersection_over_union, paired_difference_interval
from gap_export.parity.results import LevelResult
from gap_export.runtime.images.geometry import Box

# Of Acc@0.5, as in every table of referring expressions.
_HIT = 0.5


def judge_task(pairs: Sequence[AnswerPair], *, bar: float | None = None) -> LevelResult:
    """Acc@0.5 is not significantly worse, and no lower than asked for.

    Questions whose true box is not known do not count.

    Args:
        pairs: Any number.
        bar: Acc@0.5 that the candidate must have, in 0..1; None for any.
    """
    known = [(pair, pair.question.box) for pair in pairs if pair.question.box is not None]
    if not known:
        return LevelResult(level="task", status="not_run", reason="no question's true box is known")
    hits = [(_is_hit(pair.expected.box, box), _is_hit(pair.box, box)) for pair, box in known]
    both = hits.count((True, True))
    lost, won = hits.count((True, False)), hits.count((False, True))
    neither = hits.count((False, False))
    low, high = paired_difference_interval(both, won, lost, neither)
    total = len(hits)
    reference, candidate = (both + lost) / total, (both + won) / total
    reasons = []
    if high < 0:
        reasons.append(
            f"Acc@0.5 is {100 * candidate:.1f} % and not {100 * reference:.1f} %, significantly "
            f"worse: the difference is within {100 * low:.1f} to {100 * high:.1f} points"
        )
    if bar is not None and candidate < bar:
        reasons.append(f"Acc@0.5 is {100 * candidate:.1f} %; asked for {100 * bar:g} %")
    return LevelResult(
        level="task",
        status="failed" if reasons else "passed",
        reason="; ".join(reasons),
        figures={
            "questions": total,
            "reference_acc_at_50": reference,
            "candidate_acc_at_50": candidate,
            "difference": (won - lost) / total,
            "difference_low": low,
            "difference_high": high,
            "lost": lost,
            "won": won,
        },
    )


def _is_hit(box: Box | None, truth: Box) -> bool:
    return box is not None and intersection_over_union(box, truth) > _HIT
