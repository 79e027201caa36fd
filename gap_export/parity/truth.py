"""What a bundle is held against: PyTorch with the checkpoint's weights, or a golden of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from gap_export.bundle import Bundle
from gap_export.extras import require_extra
from gap_export.manifest import QuantizationSpec
from gap_export.parity.question import Question
from gap_export.parity.replay import Call, RecordingBackend
from gap_export.parity.results import TensorRow
from gap_export.progress import Progress
from gap_export.recipe import Recipe
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.session import GroundingSession
from gap_export.source import Checkpoint

if TYPE_CHECKING:
    from gap_export.families import Reference
    from gap_export.parity.golden import Golden
    from gap_export.parity.inside.reference_taps import ReferenceTaps


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Everything a reference gave.

    Attributes:
        name: What it is, for reports.
        calls: Of each question what its backend was asked and gave.
        answers: To each question.
        shared: Of what it has from the bundle, whether that is right: a row for quantized weights.
    """

    name: str
    calls: Sequence[Sequence[Call]]
    answers: Sequence[Grounding]
    shared: tuple[TensorRow, ...] = ()


class Truth(Protocol):
    """A reference, asked once for each dtype that backends compute in."""

    @property
    def name(self) -> str:
        """What it is, for reports, as long as it has not been asked."""
        ...

    @property
    def questions(self) -> Sequence[Question]:
        """What it, and every backend, is asked."""
        ...

    @property
    def seed(self) -> int:
        """Of the samples among them."""
        ...

    def check_dtype(self, dtype: str, quantization: QuantizationSpec | None) -> None:
        """Refuse a backend that it has nothing to compare with.

        Raises:
            UsageError: it cannot compute as that backend does.
        """
        ...

    def record(
        self,
        bundle: Bundle,
        *,
        dtype: str,
        quantization: QuantizationSpec | None,
        progress: Progress,
    ) -> Recorded:
        """Ask it everything.

        Args:
            bundle: An opened bundle; of every byte of it the hash has been checked.
            dtype: Of the floats that the backend computes with.
            quantization: Of the backend's decoder.
            progress: Told what is done.

        Raises:
            UsageError: the checkpoint or a picture cannot be used.
        """
        ...


class TorchTruth:
    """PyTorch on the CPU, with the weights a bundle was made from.

    Of a bundle with quantized weights it computes with these; see
    :func:`gap_export.parity.quantized.use_quantized_weights`.

    Args:
        recipe: The model's.
        checkpoint: Its weights.
        questions: What to ask.
        seed: Of the samples among them.
    """

    name = "PyTorch"

    def __init__(
        self,
        recipe: Recipe,
        checkpoint: Checkpoint,
        questions: Sequence[Question],
        *,
        seed: int = 0,
    ) -> None:
        self.questions = tuple(questions)
        self.seed = seed
        self._recipe = recipe
        self._checkpoint = checkpoint
        # Of the last kind alone: a model's weights, and all it gave, are large.
        self._kind: tuple[str, QuantizationSpec | None] | None = None
        self._reference: Reference | None = None
        self._recorded: Recorded | None = None

    def check_dtype(self, dtype: str, quantization: QuantizationSpec | None) -> None:
        """See Truth: it computes in any."""

    def taps(self, bundle: Bundle) -> ReferenceTaps:
        """What was recorded last, to be looked into."""
        from gap_export.parity.inside.reference_taps import ReferenceTaps

        assert self._reference is not None and self._kind is not None, "asked for after record()"
        return ReferenceTaps(
            reference=self._reference,
            recipe=self._recipe,
            checkpoint=self._checkpoint,
            pruning=bundle.manifest.pruning,
            quantization=self._kind[1],
        )

    def record(
        self,
        bundle: Bundle,
        *,
        dtype: str,
        quantization: QuantizationSpec | None,
        progress: Progress,
    ) -> Recorded:
        """See Truth.

        Raises:
            MissingDependencyError: PyTorch is not installed.
            UsageError: the checkpoint or a picture cannot be used.
        """
        if self._recorded is None or self._kind != (dtype, quantization):
            self._kind, self._reference = (dtype, quantization), None
            self._recorded = self._ask(bundle, dtype, quantization, progress)
        return self._recorded

    def _ask(
        self,
        bundle: Bundle,
        dtype: str,
        quantization: QuantizationSpec | None,
        progress: Progress,
    ) -> Recorded:
        require_extra("export", "checking against PyTorch")
        from gap_export.families import build_reference
        from gap_export.parity.quantized import use_quantized_weights
        from gap_export.parity.torch_backend import TorchBackend
        from gap_export.pruning import check_pruner_installed

        check_pruner_installed(bundle.manifest.pruning.pruner, bundle.manifest.tools)
        self._reference = build_reference(
            self._recipe, self._checkpoint, bundle.manifest.pruning, device="cpu", dtype=dtype
        )
        shared: tuple[TensorRow, ...] = ()
        if quantization is not None:
            shared = use_quantized_weights(
                self._reference, bundle.path, quantization, progress=progress
            )
        backend = TorchBackend(self._reference, quantization=quantization)
        recorder = RecordingBackend(backend, margins=backend.margins)
        # What a picture, a prompt and a box are to be is the recipe's to say; what the bundle says
        # of it is part of what is checked.
        recipe = self._recipe
        manifest = replace(
            bundle.manifest,
            image=recipe.image,
            grid=recipe.grid,
            prompt=recipe.prompt,
            box=recipe.box,
        )
        calls: list[list[Call]] = []
        answers: list[Grounding] = []
        with (
            GroundingSession(manifest, bundle.path, recorder) as session,
            progress.stage("asking PyTorch", total=len(self.questions)) as advance,
        ):
            for question in self.questions:
                recorder.calls = []
                answers.append(session.ground(question.image, question.expression))
                calls.append(recorder.calls)
                advance(1)
        return Recorded(name=recorder.name, calls=calls, answers=answers, shared=shared)


class GoldenTruth:
    """What PyTorch gave when a golden was recorded; needs no PyTorch.

    Args:
        golden: Of the bundle's model.
    """

    def __init__(self, golden: Golden) -> None:
        self._golden = golden

    @property
    def name(self) -> str:
        """See Truth."""
        return self._golden.name

    @property
    def questions(self) -> Sequence[Question]:
        """See Truth."""
        return self._golden.questions

    @property
    def seed(self) -> int:
        """See Truth."""
        return self._golden.seed

    def check_dtype(self, dtype: str, quantization: QuantizationSpec | None) -> None:
        """See Truth.

        Raises:
            UsageError: it was recorded in another.
        """
        self._golden.check_dtype(dtype, quantization)

    def record(
        self,
        bundle: Bundle,
        *,
        dtype: str,
        quantization: QuantizationSpec | None,
        progress: Progress,
    ) -> Recorded:
        """See Truth: it was asked when the golden was recorded.

        Raises:
            UsageError: it was recorded in another dtype.
        """
        del bundle, progress  # opened with it, and read from the disk as it is asked for
        self.check_dtype(dtype, quantization)
        return Recorded(name=self.name, calls=self._golden.calls, answers=self._golden.answers)
