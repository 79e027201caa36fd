"""What is judged: a backend that runs a bundle, or why it cannot be run here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gap_export.bundle import Bundle
from gap_export.engines.folder import engine_folders
from gap_export.errors import BundleError, GapExportError, UsageError
from gap_export.parity.levels.answers import AnswerPair
from gap_export.parity.padded_batch import decode_padded
from gap_export.parity.question import Question
from gap_export.parity.replay import replay
from gap_export.parity.results import BackendKey
from gap_export.parity.tally import Pair, Tally
from gap_export.parity.truth import Recorded, Truth
from gap_export.progress import Progress
from gap_export.runtime.backends.backend import DECODER, Backend
from gap_export.runtime.grounding import Grounding
from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import ORT, FormName, Manifest, check_form
from gap_export.spec.requests import BackendOptions
from gap_export.spec.tolerances import Tolerance, tolerances_of, with_int8_tower

# Questions among which two of different lengths are looked for.
_FOR_A_BATCH = 4


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A backend that can be run and judged.

    Attributes:
        key: The backend's name on the command line.
        form: Of the graphs that ONNX Runtime runs; None with TensorRT.
        session: A session with the backend; the caller closes it.
        decoder_graph: File of the graph that its decoder is, or was built from.
        note: What should be known of that graph.
        tolerances: Those of its dtype, by name of output.
    """

    key: BackendKey
    form: FormName | None
    session: GroundingSession
    decoder_graph: str
    note: str
    tolerances: Mapping[str, Tolerance]

    @property
    def backend(self) -> Backend:
        """What runs the bundle."""
        return self.session.backend


@dataclass(frozen=True, kw_only=True)
class CannotRun:
    """Why there is no candidate: nothing is wrong with the bundle, but with the place."""

    reason: str


@dataclass
class Answered:
    """What a candidate gave.

    Attributes:
        tally: Its outputs on the reference's inputs.
        pairs: Its own answers, beside the reference's.
        batched: But for engines, logits of a padded batch; the reference's of each row alone.
        broken: Why it could not be run on the reference's inputs; empty where it could.
    """

    tally: Tally = field(default_factory=Tally)
    pairs: list[AnswerPair] = field(default_factory=list)
    batched: list[Pair] = field(default_factory=list)
    broken: str = ""


def forms_of(
    manifest: Manifest, key: BackendKey, wanted: FormName | None
) -> tuple[FormName | None, ...]:
    """The forms of a bundle's graphs that are to be judged, each by itself.

    Args:
        manifest: The bundle's.
        key: What runs it.
        wanted: The only one; None for all that the backend can run.

    Raises:
        UsageError: the bundle has not got the one that is wanted.
    """
    if key != "ort":
        return (None,)
    check_form(manifest, wanted)
    if wanted is not None:
        return (wanted,)
    return ("base", "ort") if any(g.lowering == ORT for g in manifest.graphs) else ("base",)


def open_candidate(
    bundle: Bundle,
    key: BackendKey,
    *,
    options: BackendOptions,
    reference: Truth | None,
    form: FormName | None = None,
) -> Candidate | CannotRun:
    """Load what runs a bundle.

    Args:
        bundle: From :func:`gap_export.engines.folder.open_whole`.
        key: Which.
        options: How it runs it.
        reference: What it is to be compared with.
        form: With ONNX Runtime: of the bundle's graphs.

    Raises:
        BundleError: a graph or engines that are damaged.
        GapExportError: TensorRT cannot load an engine.
    """
    try:
        backend, decoder_graph, note = _load(bundle, key, options, form)
        try:
            tolerances = tolerances_of(
                backend.dtype,
                backend.activations,
                inference_precision=backend.inference_precision,
            )
            if bundle.manifest.has_int8_tower:
                tolerances = with_int8_tower(tolerances)
            if reference is not None:
                reference.check_dtype(backend.dtype, backend.quantization)
            session = GroundingSession(bundle.manifest, bundle.path, backend)
        except GapExportError:
            backend.close()
            raise
    except UsageError as err:
        # Damage is no matter of the place, a bundle without engines is.
        lacks_engines = key == "trt" and not engine_folders(bundle)
        if isinstance(err, BundleError) and not lacks_engines:
            raise
        return CannotRun(reason=str(err))
    return Candidate(
        key=key,
        form=form,
        session=session,
        decoder_graph=decoder_graph,
        note=note,
        tolerances=tolerances,
    )


def ask_candidate(
    candidate: Candidate,
    questions: Sequence[Question],
    recorded: Recorded,
    *,
    replays: bool,
    answers: bool,
    progress: Progress,
) -> Answered:
    """Feed a candidate what the reference was fed, and ask it the same questions."""
    found = Answered()
    with progress.stage(f"comparing {candidate.backend.name}", total=len(questions)) as advance:
        for question, calls, expected in zip(
            questions, recorded.calls, recorded.answers, strict=True
        ):
            if replays and not found.broken:
                try:
                    found.tally.add(calls, replay(calls, candidate.backend))
                except GapExportError as err:
                    found.broken = str(err)
            if answers:
                given = _ask(candidate.session, question)
                found.pairs.append(
                    AnswerPair.of_calls(question, expected, given, calls, candidate.tolerances)
                )
            advance(1)
        # Engines may be built for one row; what they are built from is the graph's, which is not.
        if replays and not found.broken and candidate.key != "trt":
            try:
                found.batched = decode_padded(candidate.backend, recorded.calls[:_FOR_A_BATCH])
            except GapExportError as err:
                found.broken = f"two questions at a time: {err}"
    return found


def _ask(session: GroundingSession, question: Question) -> Grounding | GapExportError:
    """The reference could answer: a candidate that cannot is a finding, not a failed check."""
    try:
        return session.ground(question.image, question.expression)
    except GapExportError as err:
        return err


def _load(
    bundle: Bundle, key: BackendKey, options: BackendOptions, form: FormName | None
) -> tuple[Backend, str, str]:
    """A backend, the file of its decoder's graph, and what should be known of that graph."""
    if key == "ort":
        from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend

        runs = OnnxRuntimeBackend(bundle, form=form)
        return runs, bundle.manifest.graph(DECODER, lowering=runs.forms[DECODER]).file, ""
    if key == "openvino":
        from gap_export.runtime.backends.openvino_backend import OpenVinoBackend

        return OpenVinoBackend(bundle, options.openvino), bundle.manifest.graph(DECODER).file, ""
    from gap_export.runtime.backends.tensorrt_backend import TensorRTBackend

    backend = TensorRTBackend.open(bundle, engines=options.engines)
    (file,) = (spec.graph for spec in backend.engines if spec.component == DECODER)
    return backend, file, f"read from {file}, which the engine was built from"
