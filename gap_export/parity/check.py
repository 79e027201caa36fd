"""Check a bundle: PyTorch against ONNX Runtime on real pictures, per output, per token, per box."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import GapExportError, UsageError
from gap_export.extras import require_extra
from gap_export.manifest import Manifest
from gap_export.parity.compare import Comparison, compare_arrays
from gap_export.parity.replay import Call, RecordingBackend, replay
from gap_export.parity.tolerances import TOLERANCES, Tolerance
from gap_export.progress import Progress, SilentProgress
from gap_export.recipe import Recipe
from gap_export.runtime.session import Grounding, GroundingSession


@dataclass(frozen=True, kw_only=True)
class Question:
    """A picture (path, or uint8 [H, W, 3]) and what to look for in it."""

    image: Path | NDArray[np.uint8]
    expression: str


@dataclass(frozen=True, kw_only=True)
class OutputParity:
    """One graph output over all calls.

    Attributes:
        component: The graph it comes from.
        output: Its name; logits are split into those of ``prefill`` and of ``decode``.
        calls: How often it was compared.
        max_abs_diff: The largest difference seen.
        max_abs_reference: The largest value seen in the reference.
        atol: Tolerance used.
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


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """The verdict on a bundle.

    Attributes:
        bundle: Its folder.
        candidate: What was judged, in words.
        outputs: One row per graph output.
        num_questions: Questions asked of both sides.
        equal_tokens: Questions whose greedy tokens are the same.
        equal_boxes: Questions whose boxes are the same.
        ties: Questions whose tokens part where the reference itself is undecided: its logits of the
            two tokens are no further apart than two logits may be off, 2 * atol. Rounding decides
            there, on either side.
        differing: The first few questions that differ: expression, both texts, and by how much the
            reference preferred its token where they part.
    """

    bundle: str
    candidate: str
    outputs: tuple[OutputParity, ...]
    num_questions: int
    equal_tokens: int
    equal_boxes: int
    ties: int
    differing: tuple[dict[str, Any], ...]

    @property
    def passed(self) -> bool:
        """Every output within tolerance, and tokens and boxes the same but for ties."""
        return (
            all(row.passed for row in self.outputs)
            and self.equal_tokens + self.ties == self.num_questions
            and self.equal_boxes + self.ties >= self.num_questions
        )

    def to_plain(self) -> dict[str, Any]:
        """JSON form; a difference that is not finite becomes null."""
        rows = []
        for row in self.outputs:
            plain = asdict(row)
            for key in ("max_abs_diff", "max_abs_reference"):
                plain[key] = plain[key] if np.isfinite(plain[key]) else None
            rows.append(plain)
        return {
            "passed": self.passed,
            "bundle": self.bundle,
            "candidate": self.candidate,
            "outputs": rows,
            "num_questions": self.num_questions,
            "equal_tokens": self.equal_tokens,
            "equal_boxes": self.equal_boxes,
            "ties": self.ties,
            "differing": list(self.differing),
        }


def check_bundle(
    bundle: Path,
    *,
    recipe: Recipe,
    checkpoint: Path,
    questions: Sequence[Question],
    progress: Progress | None = None,
) -> ParityReport:
    """Ask PyTorch and the bundle the same questions and compare everything they answer.

    Args:
        bundle: The bundle's folder; every byte of it is hashed first.
        recipe: The model's.
        checkpoint: Folder of the weights it was made from.
        questions: At least one.
        progress: Told what is done.

    Raises:
        UsageError: no questions, or the bundle, the checkpoint or a picture is not usable.
    """
    if not questions:
        raise UsageError("nothing to check with", seen="0 questions", allowed="at least 1")
    require_extra("export", "checking against PyTorch")
    from gap_export.families import build_reference
    from gap_export.parity.torch_backend import TorchBackend

    progress = progress or SilentProgress()
    tally = _Tally()
    answers: list[_Answer] = []
    with GroundingSession.open(bundle, verify="full") as candidate:
        manifest = candidate.manifest
        reference = build_reference(recipe, checkpoint, manifest.pruning, device="cpu")
        recorder = RecordingBackend(TorchBackend(reference))
        with (
            GroundingSession(manifest, bundle, recorder) as truth,
            progress.stage("comparing with PyTorch", total=len(questions)) as advance,
        ):
            for question in questions:
                recorder.calls.clear()
                expected = truth.ground(question.image, question.expression)
                tally.add(recorder.calls, replay(recorder.calls, candidate.backend))
                answers.append(
                    _Answer(
                        expression=question.expression,
                        expected=expected,
                        given=_ask(candidate, question),
                        logits=[c.outputs["logits"][0] for c in recorder.calls if c.is_decode],
                    )
                )
                advance(1)
        name = candidate.backend.name
    undecided = 2 * TOLERANCES[manifest.dtype]["logits"].atol
    return ParityReport(
        bundle=str(bundle),
        candidate=name,
        outputs=tally.rows(manifest),
        num_questions=len(questions),
        equal_tokens=sum(answer.same_tokens for answer in answers),
        equal_boxes=sum(answer.same_box for answer in answers),
        ties=sum(answer.margin is not None and answer.margin <= undecided for answer in answers),
        differing=tuple(a.describe() for a in answers if not (a.same_tokens and a.same_box))[:5],
    )


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """One question's two answers, and the reference's logits [V] at each step."""

    expression: str
    expected: Grounding
    given: Grounding | GapExportError
    logits: list[NDArray[Any]]

    @property
    def same_tokens(self) -> bool:
        return self.margin is None and isinstance(self.given, Grounding)

    @property
    def same_box(self) -> bool:
        # Boxes come from text of the same tokens, so nothing but an exact match is agreement.
        return isinstance(self.given, Grounding) and self.expected.box == self.given.box

    @property
    def margin(self) -> float | None:
        """By how much the reference preferred its token where the two part; None if nowhere."""
        if not isinstance(self.given, Grounding):
            return None
        pairs = zip(self.expected.token_ids, self.given.token_ids, strict=False)
        for logits, (mine, other) in zip(self.logits, pairs, strict=False):
            if mine != other:
                return float(logits[mine] - logits[other])
        # One answer goes on where the other has ended: that is no tie.
        same = self.expected.token_ids == self.given.token_ids
        return None if same else float("inf")

    def describe(self) -> dict[str, Any]:
        given = self.given
        margin = self.margin
        return {
            "expression": self.expression,
            "reference": self.expected.text,
            "candidate": given.text if isinstance(given, Grounding) else f"error: {given}",
            "margin": None if margin is None or not np.isfinite(margin) else margin,
        }


def _ask(candidate: GroundingSession, question: Question) -> Grounding | GapExportError:
    """The reference could answer: a candidate that cannot is a finding, not a failed check."""
    try:
        return candidate.ground(question.image, question.expression)
    except GapExportError as err:
        return err


_COMPONENTS = {
    "encode_text": "text_encoder",
    "encode_image": "vision_encoder",
    "embed_tokens": "embed_tokens",
    "decode": "decoder_model_merged",
}


class _Tally:
    """Comparisons by (component, output), in order of first appearance."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, str], list[tuple[NDArray[Any], NDArray[Any]]]] = {}

    def add(self, calls: list[Call], outputs: Iterable[dict[str, NDArray[Any]]]) -> None:
        prefilled = False
        for call, candidate in zip(calls, outputs, strict=True):
            if call.method == "new_cache":
                prefilled = False
            for name, value in call.outputs.items():
                label = name
                if call.is_decode:
                    label = f"{name} (decode)" if prefilled else f"{name} (prefill)"
                    prefilled = True
                key = (_COMPONENTS[call.method], label)
                self._pairs.setdefault(key, []).append((value, candidate[name]))

    def rows(self, manifest: Manifest) -> tuple[OutputParity, ...]:
        tolerances = TOLERANCES[manifest.dtype]
        rows = []
        for (component, label), pairs in self._pairs.items():
            tolerance = tolerances[label.split(" ")[0]]
            rows.append(_row(component, label, tolerance, pairs))
        return tuple(rows)


def _row(
    component: str,
    label: str,
    tolerance: Tolerance,
    pairs: list[tuple[NDArray[Any], NDArray[Any]]],
) -> OutputParity:
    results: list[Comparison] = [
        compare_arrays(truth, judged, atol=tolerance.atol, rtol=tolerance.rtol)
        for truth, judged in pairs
    ]
    return OutputParity(
        component=component,
        output=label,
        calls=len(results),
        max_abs_diff=max(r.max_abs_diff for r in results),
        max_abs_reference=max(r.max_abs_reference for r in results),
        atol=tolerance.atol,
        rtol=tolerance.rtol,
        passed=all(r.passed for r in results),
        reason=next((r.reason for r in results if not r.passed), ""),
    )
