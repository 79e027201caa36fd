"""Does the score tell objects that are there from those that are not?

An answer is a detection where its score reaches a threshold. Recall is the share of expressions
whose object is there that are detected, wherever the box is; the false-box rate is the share of the
others that are. An answer without a box is never detected.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from gap_export.evaluation.questions import AnyQuestion
from gap_export.evaluation.records import Record
from gap_export.evaluation.statistics import draw_clusters

Interval = tuple[float, float]
Floats = NDArray[np.float64]
TARGET_RECALL = 0.95
NUM_BINS = 10
# A curve of more points shows no more.
MAX_POINTS = 200


@dataclass(frozen=True, kw_only=True)
class ScoredAnswers:
    """Scores of answers, and whether the object asked for is there.

    Attributes:
        scores: float64 [N]; 0 for an answer without a box.
        is_there: bool [N]; both values are among them.
        images: N names of the images asked about.
    """

    scores: Floats
    is_there: NDArray[np.bool_]
    images: tuple[str, ...]

    @classmethod
    def of(
        cls, questions: Sequence[AnyQuestion], records: Mapping[str, Record]
    ) -> ScoredAnswers | None:
        """Those that could be asked; None unless some objects are there and some are not."""
        asked = [one for one in questions if records[one.id].error is None]
        is_there = np.array([one.box is not None for one in asked], dtype=np.bool_)
        if is_there.all() or not is_there.any():
            return None
        return cls(
            scores=np.array([records[one.id].score or 0.0 for one in asked], dtype=np.float64),
            is_there=is_there,
            images=tuple(one.image_id for one in asked),
        )


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The ROC curve of one weighting of answers, from the highest threshold down.

    Attributes:
        thresholds: float64 [U], the different scores, descending; 0 is not among them.
        recall: float64 [..., U].
        false_boxes: float64 [..., U], false-box rate.
        auroc: float64 [...].
    """

    thresholds: Floats
    recall: Floats
    false_boxes: Floats
    auroc: Floats

    def at(self, recall: float) -> NDArray[np.int64]:
        """Place of the highest threshold that reaches a recall; the lowest where none does."""
        reached = self.recall >= recall - 1e-12
        found: NDArray[np.int64] = np.where(
            reached.any(axis=-1), reached.argmax(axis=-1), len(self.thresholds) - 1
        )
        return found


def trace_curve(answers: ScoredAnswers, weights: Floats | None = None) -> Curve:
    """Rates by threshold, and the area under the curve, ties counting one half (Hanley 1982).

    Args:
        answers: What is ranked.
        weights: float64 [..., N], how often each answer counts; None: each once.
    """
    values, places = np.unique(-answers.scores, return_inverse=True)
    weights = np.ones(len(answers.scores)) if weights is None else weights
    order = np.argsort(places, kind="stable")
    starts = np.searchsorted(places[order], np.arange(len(values)))
    counts = [
        np.add.reduceat(weights[..., order] * kind[order], starts, axis=-1)
        for kind in (answers.is_there, ~answers.is_there)
    ]
    # A draw of images may hold none of one kind; its rates are then 0.
    there, absent = (
        one / np.maximum(one.sum(axis=-1, keepdims=True), np.finfo(np.float64).tiny)
        for one in counts
    )
    behind = 1.0 - np.cumsum(absent, axis=-1)
    auroc = (there * (behind + absent / 2)).sum(axis=-1)
    is_box = values < 0
    return Curve(
        thresholds=-values[is_box],
        recall=np.cumsum(there, axis=-1)[..., is_box],
        false_boxes=np.cumsum(absent, axis=-1)[..., is_box],
        auroc=auroc,
    )


def calibration_error(answers: ScoredAnswers) -> float:
    """Expected calibration error of the score read as the probability that the object is there.

    The mean over 10 bins of equal width of how far the mean score is from the share of objects that
    are there, weighted by the answers in a bin (Guo et al. 2017, arXiv 1706.04599).
    """
    bins = np.minimum((answers.scores * NUM_BINS).astype(np.int64), NUM_BINS - 1)
    gaps = np.bincount(bins, weights=answers.scores - answers.is_there, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(bins))


@dataclass(frozen=True, kw_only=True)
class Absence:
    """How well the score tells what is there.

    Attributes:
        num_present: Answers about objects that are there.
        num_absent: Answers about objects that are not.
        num_boxes: Of the latter those with a box, at any score.
        auroc: Probability that an object that is there has the higher score, ties counting half.
        auroc_ci95: 95 % interval: bootstrap over images.
        recall: What is reached; at least 0.95 where so many answers have a box.
        threshold: The highest score that reaches it.
        false_box_rate: Share of the absent objects that are detected at that threshold.
        false_box_ci95: 95 % interval: bootstrap over images, each with a threshold of its own.
        calibration_error: See :func:`calibration_error`.
        auroc_by_kind: Against all that are there, by kind of the absent expressions.
    """

    num_present: int
    num_absent: int
    num_boxes: int
    auroc: float
    auroc_ci95: Interval
    recall: float
    threshold: float
    false_box_rate: float
    false_box_ci95: Interval
    calibration_error: float
    auroc_by_kind: Mapping[str, float] = field(default_factory=dict)


def judge_absence(
    questions: Sequence[AnyQuestion], records: Mapping[str, Record], *, seed: int
) -> Absence | None:
    """Sum up the answers of one setting; None without both kinds of questions, or any box.

    Args:
        questions: All that were asked.
        records: By question.
        seed: Seed of the bootstrap.
    """
    answers = ScoredAnswers.of(questions, records)
    if answers is None or not answers.scores.any():
        return None
    kinds = dict.fromkeys(one.kind for one in questions if one.box is None and one.kind)
    by_kind = {}
    for kind in kinds:
        chosen = [one for one in questions if one.box is not None or one.kind == kind]
        of_kind = ScoredAnswers.of(chosen, records)
        if of_kind is not None:
            by_kind[kind] = float(trace_curve(of_kind).auroc)
    return replace(summarize(answers, seed=seed), auroc_by_kind=by_kind)


def summarize(answers: ScoredAnswers, *, seed: int, recall: float = TARGET_RECALL) -> Absence:
    """What scores alone say, some of which are of boxes; ``recall`` in place of 0.95."""
    curve = trace_curve(answers)
    place = int(curve.at(recall))
    aurocs, rates = [], []
    for weights in draw_clusters(answers.images, seed=seed):
        drawn = trace_curve(answers, weights)
        aurocs.append(drawn.auroc)
        rates.append(np.take_along_axis(drawn.false_boxes, drawn.at(recall)[:, None], axis=-1))
    absent = ~answers.is_there
    return Absence(
        num_present=int(answers.is_there.sum()),
        num_absent=int(absent.sum()),
        num_boxes=int((answers.scores[absent] > 0).sum()),
        auroc=float(curve.auroc),
        auroc_ci95=_interval(aurocs),
        recall=float(curve.recall[place]),
        threshold=float(curve.thresholds[place]),
        false_box_rate=float(curve.false_boxes[place]),
        false_box_ci95=_interval(rates),
        calibration_error=calibration_error(answers),
    )


def curve_points(curve: Curve) -> tuple[tuple[float, float, float], ...]:
    """Threshold, false-box rate and recall along a curve, its ends included."""
    last = len(curve.thresholds) - 1
    places = np.unique(np.linspace(0, last, min(last + 1, MAX_POINTS)).round().astype(np.int64))
    columns = (curve.thresholds, curve.false_boxes, curve.recall)
    return tuple(
        (float(one), float(two), float(three))
        for one, two, three in zip(*(column[places] for column in columns), strict=True)
    )


def _interval(values: Sequence[Floats]) -> Interval:
    low, high = np.quantile(np.concatenate(values), [0.025, 0.975])
    return float(low), float(high)
