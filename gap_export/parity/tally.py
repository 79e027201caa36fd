"""Comparisons of one check, gathered by graph output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.parity.compare import (
    Comparison,
    compare_arrays,
    compare_selections,
    find_ties,
    largest_of,
    measure_differences,
    measure_selections,
    pair_features,
)
from gap_export.parity.replay import NEW_CACHE, Call
from gap_export.parity.results import TensorRow
from gap_export.spec.tolerances import Tolerance

Arrays = Mapping[str, NDArray[Any]]
Pair = tuple[NDArray[Any], NDArray[Any]]

_KEPT, _FEATURES = "keep_indices", "image_features"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One call, on both sides."""

    call: Call
    calls: Sequence[Call]
    outputs: Arrays


class Tally:
    """Calls by (component, output), in order of first appearance."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], list[Compared]] = {}

    def add(self, calls: Sequence[Call], outputs: Iterable[Arrays]) -> None:
        """Take the recorded calls of one question, and what the candidate gave for each."""
        prefilled = False
        for call, candidate in zip(calls, outputs, strict=True):
            if call.component == NEW_CACHE:
                prefilled = False
            for name in call.outputs:
                label = name
                if call.is_decode:
                    label = f"{name} (decode)" if prefilled else f"{name} (prefill)"
                    prefilled = True
                found = self._found.setdefault((call.component, label), [])
                found.append(Compared(call=call, calls=calls, outputs=candidate))

    def rows(self, tolerances: Mapping[str, Tolerance]) -> tuple[TensorRow, ...]:
        """Compare everything."""
        found = []
        for (component, label), calls in self._found.items():
            name = _name(label)
            row = tensor_row(component, label, _pairs(name, calls, tolerances), tolerances[name])
            if name == _KEPT:
                ties = sum(bool(_ties(one, tolerances[_KEPT]).any()) for one in calls)
                row = replace(row, ties=ties)
            found.append(row)
        return tuple(found)

    def first_failures(self, tolerances: Mapping[str, Tolerance]) -> dict[str, Compared]:
        """The first call of each component whose output is beyond its tolerance."""
        failures: dict[str, Compared] = {}
        for (component, label), found in self._found.items():
            name = _name(label)
            verdicts = _compare(_pairs(name, found, tolerances), tolerances[name])
            for compared, verdict in zip(found, verdicts, strict=True):
                if not verdict.passed:
                    failures.setdefault(component, compared)
                    break
        return failures


def tensor_row(
    component: str, tensor: str, pairs: Sequence[Pair], tolerance: Tolerance, *, module: str = ""
) -> TensorRow:
    """Compare one tensor over all calls.

    Args:
        component: The graph it comes from.
        tensor: Its name.
        pairs: Reference and candidate of each call, at least one.
        tolerance: The tensor's; that of kept tokens says how many may have changed.
        module: Which module of the model gives it.
    """
    largest = max(largest_of(truth) for truth, _ in pairs)
    found = _compare(pairs, tolerance)
    selects = tolerance.max_changed_fraction > 0
    differences = (measure_selections if selects else measure_differences)(pairs)
    # Selections that do not hold together are infinitely far off, however many tokens they share.
    max_abs_diff = max([differences.max_abs_diff, *(one.max_abs_diff for one in found)])
    return TensorRow(
        component=component,
        tensor=tensor,
        module=module,
        calls=len(found),
        **differences._replace(max_abs_diff=max_abs_diff)._asdict(),
        max_abs_reference=largest,
        atol=tolerance.absolute(largest),
        rtol=tolerance.rtol,
        why=tolerance.why,
        passed=all(one.passed for one in found),
        reason=next((one.reason for one in found if not one.passed), ""),
    )


def _compare(pairs: Sequence[Pair], tolerance: Tolerance) -> list[Comparison]:
    """The verdict on each call; how far they may be off depends on the largest value of all."""
    fraction = tolerance.max_changed_fraction
    if fraction > 0:
        return [compare_selections(*pair, max_changed_fraction=fraction) for pair in pairs]
    atol = tolerance.absolute(max(largest_of(truth) for truth, _ in pairs))
    return [compare_arrays(*pair, atol=atol, rtol=tolerance.rtol) for pair in pairs]


def _pairs(name: str, found: Sequence[Compared], tolerances: Mapping[str, Tolerance]) -> list[Pair]:
    """Both sides of an output; what a tie explains is left out."""
    selected = tolerances[_KEPT]
    pairs = [(one.call.outputs[name], one.outputs[name]) for one in found]
    if name not in {_KEPT, _FEATURES}:
        return pairs
    for place, one in enumerate(found):
        ties = _ties(one, selected)
        if name == _FEATURES and (selected.max_changed_fraction > 0 or ties.any()):
            # Features of tokens that only one side kept have nothing to be compared with.
            pairs[place] = pair_features(one.call.outputs, one.outputs)
        elif name == _KEPT and ties.any():
            truth, judged = pairs[place]
            pairs[place] = truth, np.where(ties[:, None], truth, judged)
    return pairs


def _ties(one: Compared, selected: Tolerance) -> NDArray[np.bool_]:
    kept = one.call.outputs[_KEPT]
    return find_ties(
        kept,
        one.outputs[_KEPT],
        one.call.margins,
        tie_margin=selected.tie_margin,
        max_changed=selected.max_changed_in_tie(kept.shape[-1]),
    )


def _name(label: str) -> str:
    """The output's name, without the phase behind it."""
    return label.split(" ", maxsplit=1)[0]
