"""Check a bundle: PyTorch against what runs it, on real pictures: outputs, tokens, boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gap_export.errors import GapExportError, UsageError
from gap_export.extras import require_extra
from gap_export.parity.replay import RecordingBackend, replay
from gap_export.parity.tally import OutputParity, Tally
from gap_export.parity.tolerances import TOLERANCES, Tolerance
from gap_export.progress import Progress, SilentProgress
from gap_export.recipe import Recipe
from gap_export.runtime.session import BackendName, Grounding, GroundingSession
from gap_export.source import Checkpoint


@dataclass(frozen=True, kw_only=True)
class Question:
    """A picture (path, or uint8 [H, W, 3]) and what to look for in it."""

    image: Path | NDArray[np.uint8]
    expression: str


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """The verdict on a bundle.

    Attributes:
        bundle: Its folder.
        candidate: What was judged, in words.
        reference: What it was compared with: PyTorch, and with whose weights.
        outputs: One row per graph output; before them, where a bundle's weights are quantized, one
            for these: whether they are what the checkpoint's round to.
        num_questions: Questions asked of both sides.
        equal_tokens: Questions whose greedy tokens are the same.
        equal_boxes: Questions whose boxes are the same.
        ties: Questions whose tokens part where the reference itself is undecided: its logits of the
            two tokens are no further apart than two logits may be off; or the two saw other visual
            tokens, as few as the tolerance of keep_indices allows. Rounding decides there, on
            either side.
        differing: The first few questions that differ: expression, both texts, and by how much the
            reference preferred its token where they part.
    """

    bundle: str
    candidate: str
    reference: str
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
            "reference": self.reference,
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
    checkpoint: Checkpoint,
    questions: Sequence[Question],
    backend: BackendName = "onnxruntime",
    engines: str | None = None,
    progress: Progress | None = None,
) -> ParityReport:
    """Ask PyTorch and the bundle the same questions and compare everything they answer.

    Of a bundle with quantized weights PyTorch computes with these; see
    :func:`gap_export.parity.quantized.use_quantized_weights`.

    Args:
        bundle: The bundle's folder; every byte of it is hashed first.
        recipe: The model's.
        checkpoint: The weights it was made from.
        questions: At least one.
        backend: What runs the bundle. PyTorch computes in the same dtype.
        engines: With TensorRT: which of the bundle's engines.
        progress: Told what is done.

    Raises:
        UsageError: no questions, or the bundle, the checkpoint or a picture is not usable, or no
            tolerance is known for the dtype.
    """
    if not questions:
        raise UsageError("nothing to check with", seen="0 questions", allowed="at least 1")
    require_extra("export", "checking against PyTorch")
    progress = progress or SilentProgress()
    tally = Tally()
    answers: list[_Answer] = []
    with GroundingSession.open(
        bundle, backend=backend, engines=engines, verify="full"
    ) as candidate:
        tolerances = _tolerances(candidate.backend.dtype)
        recorder, weights = _build_truth(bundle, recipe, checkpoint, candidate, progress)
        with (
            GroundingSession(candidate.manifest, bundle, recorder) as truth,
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
    outputs = (*weights, *tally.rows(tolerances))
    selected = all(row.passed for row in outputs if row.output == "keep_indices")
    return ParityReport(
        bundle=str(bundle),
        candidate=name,
        reference=recorder.name,
        outputs=outputs,
        num_questions=len(questions),
        equal_tokens=sum(answer.same_tokens for answer in answers),
        equal_boxes=sum(answer.same_box for answer in answers),
        ties=sum(
            answer.is_tie(tolerances["logits"]) or (selected and answer.saw_others)
            for answer in answers
        ),
        differing=tuple(a.describe() for a in answers if not (a.same_tokens and a.same_box))[:5],
    )


def _build_truth(
    bundle: Path,
    recipe: Recipe,
    checkpoint: Checkpoint,
    candidate: GroundingSession,
    progress: Progress,
) -> tuple[RecordingBackend, tuple[OutputParity, ...]]:
    """PyTorch in the candidate's dtype; and of what the two share, whether it is right."""
    from gap_export.families import build_reference
    from gap_export.parity.quantized import use_quantized_weights
    from gap_export.parity.torch_backend import TorchBackend

    judged = candidate.backend
    reference = build_reference(
        recipe, checkpoint, candidate.manifest.pruning, device="cpu", dtype=judged.dtype
    )
    shared: tuple[OutputParity, ...] = ()
    if judged.quantization is not None:
        shared = use_quantized_weights(reference, bundle, judged.quantization, progress=progress)
    return RecordingBackend(TorchBackend(reference, quantization=judged.quantization)), shared


def _tolerances(dtype: str) -> Mapping[str, Tolerance]:
    if dtype not in TOLERANCES:
        raise UsageError(
            "how far results may be off has not been measured for this dtype",
            seen=dtype,
            allowed=", ".join(TOLERANCES),
            fix="export with another dtype",
        )
    return TOLERANCES[dtype]


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

    @property
    def saw_others(self) -> bool:
        """Whether the two part after they saw different visual tokens."""
        given = self.given
        return (
            isinstance(given, Grounding)
            and not self.same_tokens
            and set(given.keep_indices) != set(self.expected.keep_indices)
        )

    def is_tie(self, tolerance: Tolerance) -> bool:
        """Whether the reference was undecided where the two part."""
        largest = max((float(np.abs(logits).max()) for logits in self.logits), default=0.0)
        undecided = 2 * (tolerance.atol + tolerance.share * largest)
        return self.margin is not None and self.margin <= undecided

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
