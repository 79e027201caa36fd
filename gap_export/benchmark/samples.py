"""What samples of time say: which count, how they spread, and what is faster. No clock here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from gap_export.benchmark.results import TOTAL, Spread

# Of the processors' time. A sample during which others take more is set aside.
BUSY_SHARE = 0.1
# With fewer quiet samples than this, or than half of them, all count, and a warning says so.
MIN_QUIET = 3


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer.

    Attributes:
        number: Of the round; samples of the same round are of the same question.
        stages: Milliseconds by stage.
        others: Share of the processors' time that other processes took meanwhile.
        answer_tokens: Tokens of the answer.
        prompt_tokens: Tokens of the prompt.
        energy_j: What the board's meter saw; None where there is none.
    """

    number: int
    stages: Mapping[str, float]
    others: float
    answer_tokens: int
    prompt_tokens: int
    energy_j: float | None = None


def spread_of(values: Sequence[float]) -> Spread:
    """Median and quartiles.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    if not values or not np.isfinite(values).all():
        raise ValueError(f"no median of {list(values)}")
    low, median, high = np.quantile(np.asarray(values, dtype=np.float64), [0.25, 0.5, 0.75])
    return Spread(median=float(median), low=float(low), high=float(high), n=len(values))


def quiet(samples: Sequence[Sample]) -> list[Sample]:
    """Those during which nothing else ran; empty where too few are left to count alone."""
    found = [sample for sample in samples if sample.others <= BUSY_SHARE]
    enough = len(found) >= min(MIN_QUIET, len(samples)) and 2 * len(found) >= len(samples)
    return found if enough else []


def counting(samples: Sequence[Sample]) -> list[Sample]:
    """The samples that figures are made of: the quiet ones, else all."""
    return quiet(samples) or list(samples)


def stage_spreads(samples: Sequence[Sample]) -> dict[str, Spread]:
    """Of each stage, over the samples that count."""
    used = counting(samples)
    names = dict.fromkeys(name for sample in used for name in sample.stages)
    return {
        name: spread_of([sample.stages[name] for sample in used if name in sample.stages])
        for name in names
    }


def speedups(unpruned: Sequence[Sample], pruned: Sequence[Sample]) -> dict[str, Spread]:
    """By stage, how many times as fast: of each round by itself, so that load counts alike.

    Only rounds that count on both sides are compared; where there is none, all.
    """
    first = {sample.number: sample for sample in counting(unpruned)}
    second = {sample.number: sample for sample in counting(pruned)}
    if not first.keys() & second.keys():
        first = {sample.number: sample for sample in unpruned}
        second = {sample.number: sample for sample in pruned}
    rounds = sorted(first.keys() & second.keys())
    names = dict.fromkeys(name for number in rounds for name in second[number].stages)
    found = {}
    for name in names:
        pairs = [(first[n].stages.get(name, 0.0), second[n].stages.get(name, 0.0)) for n in rounds]
        ratios = [slow / fast for slow, fast in pairs if slow > 0 and fast > 0]
        if ratios:
            found[name] = spread_of(ratios)
    return found


def fastest(totals: Mapping[str, Sequence[Sample]]) -> tuple[str, list[str]]:
    """What answers soonest, and what cannot be told from it.

    Args:
        totals: Samples by backend, at least one.

    Returns:
        The backend of the smallest median, and those whose ratio to it is not clear: a quarter of
        the rounds or more say otherwise.
    """
    medians = {
        name: spread_of([one.stages[TOTAL] for one in counting(samples)]).median
        for name, samples in totals.items()
    }
    best = min(medians, key=lambda name: medians[name])
    unclear = [
        name
        for name, samples in totals.items()
        if name != best and speedups(samples, totals[best])[TOTAL].low <= 1.0
    ]
    return best, unclear
