"""What a bundle is held against: PyTorch with the checkpoint's weights, or a golden of that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

from gap_export.bundle import Bundle
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import ComputationError, ParityError
from gap_export.extras import require_extra
from gap_export.parity.question import Question
from gap_export.parity.replay import Call, RecordingBackend
from gap_export.parity.results import Divergence, TensorRow
from gap_export.parity.uncached import decode_uncached, uncached_row
from gap_export.progress import Progress
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import QuantizationSpec
from gap_export.spec.recipe import Recipe
from gap_export.spec.tolerances import tolerances_of

if TYPE_CHECKING:
    from gap_export.families import Reference
    from gap_export.parity.golden import Golden
    from gap_export.parity.inside.reference_taps import ReferenceTaps


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """Everything a reference gave.

    Attributes:
        name: What it is, for reports.
        calls: What its backend was asked and gave, by question.
        answers: To each question.
        shared: Whether what both sides have alike is right: a row for quantized weights, and one
            for decoding with a cache.
        other_facts: What the bundle says of the model, and recipe and checkpoint do not.
    """

    name: str
    calls: Sequence[Sequence[Call]]
    answers: Sequence[Grounding]
    shared: tuple[TensorRow, ...] = ()
    other_facts: tuple[str, ...] = ()


class ReferenceOverflowError(ParityError):
    """The reference itself gives no numbers: there is nothing to compare with."""

    def __init__(self, name: str, err: ComputationError, found: Divergence | None) -> None:
        super().__init__(
            f"{name} itself does not compute this model in numbers",
            seen=f"{err.what}: {err.seen}",
            fix=f"{found.describe()} Export it in another dtype: --dtype float32"
            if found is not None
            else "see that the checkpoint is whole",
        )
        self.name = name
        self.found = found


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
        """Seed of the samples among them."""
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
            dtype: Dtype of the floats that the backend computes with.
            quantization: How the backend's decoder is quantized.
            progress: Progress reporter.

        Raises:
            ReferenceOverflowError: it gives NaN or infinity.
            UsageError: the checkpoint or an image cannot be used.
        """
        ...


class TorchTruth:
    """PyTorch on the CPU, with the weights a bundle was made from.

    Of a bundle with quantized weights it computes with these; see
    :func:`gap_export.parity.quantized.use_quantized_weights`.
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
            ReferenceOverflowError: it gives NaN or infinity.
            UsageError: the checkpoint or an image cannot be used.
        """
        if self._recorded is None or self._kind != (dtype, quantization):
            self._kind, self._reference = (dtype, quantization), None
            self._recorded = self._ask(bundle, dtype, quantization, progress)
        return self._recorded

    def _ask(
        self, bundle: Bundle, dtype: str, quantization: QuantizationSpec | None, progress: Progress
    ) -> Recorded:
        require_extra("export", "checking against PyTorch")
        from gap_export.families import build_reference, load_family

        load_family(self._recipe, progress)
        from gap_export.exporting.torch_backend import TorchBackend
        from gap_export.parity.facts import find_other_facts, write_assets
        from gap_export.parity.int8_tower import use_int8_tower
        from gap_export.parity.quantized import use_quantized_weights
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
        if bundle.manifest.has_int8_tower:
            use_int8_tower(self._reference)
            backend.name += ", its tower rounded to int8 as the bundle's is"
        recorder = RecordingBackend(backend, margins=backend.margins)
        recipe = self._recipe
        # What the bundle says of these is part of what is checked.
        manifest = replace(
            bundle.manifest,
            image=self._reference.image(recipe),
            grid=recipe.grid,
            prompt=recipe.prompt,
            box=recipe.box,
            decoder=self._reference.decoder_spec,
            text_encoder=self._reference.text_encoder_spec,
        )
        calls: list[list[Call]] = []
        answers: list[Grounding] = []
        with TemporaryDirectory() as assets:
            write_assets(self._reference, Path(assets))
            session = GroundingSession(manifest, assets, recorder)
        with session, progress.stage("asking PyTorch", total=len(self.questions)) as advance:
            for question in self.questions:
                recorder.calls = []
                try:
                    answers.append(session.ground(question.image, question.expression))
                except ComputationError as err:
                    from gap_export.parity.inside.overflow import find_overflow

                    made = recorder.calls
                    # The last call is the first to give what is no number.
                    where = find_overflow(bundle, made[-1], self.taps(bundle), calls=made)
                    raise ReferenceOverflowError(recorder.name, err, where) from err
                calls.append(recorder.calls)
                advance(1)
        # Of one question: it costs a prefill.
        pair = next((pair for each in calls if (pair := decode_uncached(backend, each))), None)
        if pair is not None:
            shared = (*shared, uncached_row([pair], tolerances_of(dtype)["logits"]))
        return Recorded(
            name=recorder.name,
            calls=calls,
            answers=answers,
            shared=shared,
            other_facts=tuple(find_other_facts(bundle, self._reference, manifest.image)),
        )


class GoldenTruth:
    """What PyTorch gave when a golden was recorded; needs no PyTorch."""

    def __init__(self, golden: Golden) -> None:
        self.name, self.questions, self.seed = golden.name, golden.questions, golden.spec.seed
        self.check_dtype = golden.check_dtype
        self._golden = golden
        self._holds_together = False

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
            UsageError: it was recorded in another dtype, or contradicts itself.
        """
        from gap_export.parity.golden.playback import check_holds_together

        self.check_dtype(dtype, quantization)
        if not self._holds_together:
            with progress.stage("reading the golden"):
                check_holds_together(self._golden, bundle)
            self._holds_together = True
        return Recorded(name=self.name, calls=self._golden.calls, answers=self._golden.answers)
