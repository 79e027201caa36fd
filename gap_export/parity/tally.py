"""Comparisons of one check, gathered by graph output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.parity.compare import Comparison, compare_arrays, compare_selections, pair_features
from gap_export.parity.replay import Call
from gap_export.parity.tolerances import Tolerance

Arrays = Mapping[str, NDArray[Any]]

_COMPONENTS = {
    "encode_text": "text_encoder",
    "encode_image": "vision_encoder",
    "score_tokens": "vision_encoder",
    "prune_tokens": "token_pruner",
    "image_newline": "newline",
    "embed_tokens": "embed_tokens",
    "decode": "decoder_model_merged",
}


@dataclass(frozen=True, kw_only=True)
class OutputParity:
    """One graph output over all calls.

    Attributes:
        component: The graph it comes from, or ``newline``.
        output: Its name; logits are split into those of ``prefill`` and of ``decode``.
        calls: How often it was compared.
        max_abs_diff: The largest difference seen.
        max_abs_reference: The largest value seen in the reference.
        atol: Tolerance used, its share of the largest value included.
        rtol: Tolerance used.
        passed: Every call was within tolerance.
        reason: The first failure, in words.
    """

    component: str
    output: str
    calls: int
    max_abs_diff: float
    max_abs_reference: float
    atol: float
    rtol: float
    passed: bool
    reason: str


class Tally:
    """Pairs of outputs by (component, output), in order of first appearance."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, str], list[tuple[Arrays, Arrays]]] = {}

    def add(self, calls: Iterable[Call], outputs: Iterable[Arrays]) -> None:
        """Take the recorded calls of one question, and what the candidate gave for each.

        Args:
            calls: Of the reference.
            outputs: Of the candidate, in the same order.
        """
        prefilled = False
        for call, candidate in zip(calls, outputs, strict=True):
            if call.method == "new_cache":
                prefilled = False
            for name in call.outputs:
                label = name
                if call.is_decode:
                    label = f"{name} (decode)" if prefilled else f"{name} (prefill)"
                    prefilled = True
                key = (_COMPONENTS[call.method], label)
                self._pairs.setdefault(key, []).append((call.outputs, candidate))

    def rows(self, tolerances: Mapping[str, Tolerance]) -> tuple[OutputParity, ...]:
        """Compare everything.

        Args:
            tolerances: By name of output.
        """
        return tuple(
            _row(component, label, tolerances, pairs)
            for (component, label), pairs in self._pairs.items()
        )


def _row(
    component: str,
    label: str,
    tolerances: Mapping[str, Tolerance],
    pairs: list[tuple[Arrays, Arrays]],
) -> OutputParity:
    name = label.split(" ", maxsplit=1)[0]
    tolerance = tolerances[name]
    largest = max(_largest(truth[name]) for truth, _ in pairs)
    atol = tolerance.atol + tolerance.share * largest
    may_select_others = tolerances["keep_indices"].others > 0
    results: list[Comparison] = []
    for truth, judged in pairs:
        one, other = truth[name], judged[name]
        if name == "keep_indices" and tolerance.others > 0:
            results.append(compare_selections(one, other, others=tolerance.others))
            continue
        if name == "image_features" and may_select_others:
            # Features of tokens that only one side kept have nothing to be compared with.
            one, other = pair_features(truth, judged)
        results.append(compare_arrays(one, other, atol=atol, rtol=tolerance.rtol))
    return OutputParity(
        component=component,
        output=label,
        calls=len(results),
        max_abs_diff=max(r.max_abs_diff for r in results),
        max_abs_reference=max(r.max_abs_reference for r in results),
        atol=atol,
        rtol=tolerance.rtol,
        passed=all(r.passed for r in results),
        reason=next((r.reason for r in results if not r.passed), ""),
    )


def _largest(values: NDArray[Any]) -> float:
    # What is not finite fails the comparison; it must not widen its tolerance.
    finite = np.abs(values[np.isfinite(values)].astype(np.float64))
    return float(finite.max(initial=0.0))
