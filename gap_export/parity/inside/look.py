"""Where outputs begin to differ, and layer by layer how far: of a candidate that was judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gap_export.bundle import Bundle
from gap_export.errors import GapExportError
from gap_export.parity.candidate import Answered, Candidate
from gap_export.parity.replay import Call
from gap_export.parity.results import Divergence, TensorRow
from gap_export.parity.truth import Recorded, TorchTruth, Truth
from gap_export.progress import Progress
from gap_export.runtime.backends.backend import DECODER

_NO_LAYERS = "where that begins is not known: a golden does not hold what is inside a model"
_NO_OWN_FORM = (
    "modules are compared with the base form, whose nodes they are: see there whether it is off"
)
_NO_ENGINES = "where that begins is not known: engines cannot be looked into; see --backend ort"


@dataclass(frozen=True, kw_only=True)
class Inside:
    """What is to be seen inside the graphs.

    Attributes:
        layers: A row for each module, where they are asked for.
        divergences: Where it begins, for each graph whose outputs are off.
        note: Why that is not known, where it is not.
    """

    layers: tuple[TensorRow, ...] = ()
    divergences: tuple[Divergence, ...] = ()
    note: str = ""


def look_inside(
    bundle: Bundle,
    candidate: Candidate,
    reference: Truth,
    recorded: Recorded,
    answered: Answered,
    *,
    per_layer: bool,
    progress: Progress,
) -> Inside:
    """Look into the base graphs, beside PyTorch's modules.

    Args:
        bundle: Whose graphs they are.
        candidate: What ran them.
        reference: What recorded.
        recorded: What it gave.
        answered: What the candidate gave for the same.
        per_layer: Whether rows of layers are wanted; of the first question.
        progress: Progress reporter.
    """
    # The newline is a tensor in a file and has no graph.
    failures = {
        name: one
        for name, one in answered.tally.first_failures(candidate.tolerances).items()
        if name in _graphs(bundle)
    }
    if not isinstance(reference, TorchTruth):
        return Inside(note=_NO_LAYERS if failures else "")
    if candidate.key == "trt":
        return Inside(note=_NO_ENGINES if failures else "")
    if candidate.form == "ort":
        return Inside(note=_NO_OWN_FORM if failures else "")
    if not failures and not per_layer:
        return Inside()
    from gap_export.parity.inside.divergence import compare_layers, find_divergence
    from gap_export.parity.inside.overflow import find_overflow, is_number

    taps = reference.taps(bundle)
    found: list[Divergence] = []
    notes: list[str] = []
    layers: list[TensorRow] = []
    with progress.stage("looking inside the graphs") as advance:
        for component, one in failures.items():
            try:
                place = find_divergence(bundle, component, one.call, taps, calls=one.calls)
                overflow = (
                    None
                    if all(map(is_number, one.outputs.values()))
                    else find_overflow(bundle, one.call, taps, calls=one.calls)
                )
            except GapExportError as err:
                notes.append(f"where {component} begins to be off could not be found: {err}")
            else:
                if place is None:
                    notes.append(
                        f"nothing inside {component} is off where ONNX Runtime runs it without "
                        "optimizations: what is wrong lies in how it was run"
                    )
                else:
                    found.append(place)
                if overflow is not None:
                    found.append(overflow)
            advance(1)
        if per_layer:
            calls = recorded.calls[0]
            for component, call in _first_calls(bundle, calls):
                layers += compare_layers(bundle, component, call, taps, calls=calls)
                advance(1)
    return Inside(layers=tuple(layers), divergences=tuple(found), note="; ".join(notes))


def _graphs(bundle: Bundle) -> set[str]:
    return {graph.component for graph in bundle.manifest.graphs}


def _first_calls(bundle: Bundle, calls: Sequence[Call]) -> Iterator[tuple[str, Call]]:
    """The first call of each graph, and of the decoder the first step as well."""
    left = {component: 2 if component == DECODER else 1 for component in _graphs(bundle)}
    for call in calls:
        if left.get(call.component, 0) > 0:
            left[call.component] -= 1
            yield call.component, call
