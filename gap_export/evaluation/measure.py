"""Asking a bundle: from a shard of questions to a record for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from gap_export.bundle import Bundle, open_bundle
from gap_export.errors import (
    ComputationError,
    ExpressionError,
    GapExportError,
    ImageError,
    UsageError,
)
from gap_export.evaluation.questions import AnyQuestion
from gap_export.evaluation.records import Record
from gap_export.evaluation.remembering import RememberingBackend
from gap_export.evaluation.settings import Misalignment, Setting, count_as_one
from gap_export.evaluation.workers import Shard
from gap_export.runtime.answering import EditRow
from gap_export.runtime.answers import has_ended
from gap_export.runtime.backends.backend import Backend
from gap_export.runtime.boxes import parse_answer
from gap_export.runtime.images.image import ImageInput
from gap_export.runtime.session import BackendName, GroundingSession
from gap_export.spec.manifest import GridSpec, Manifest, PromptSpec
from gap_export.spec.requests import DEFAULT_BACKEND, BackendOptions, GrammarName

# Expressions about one image that are asked together, at most. Memory grows with it.
MAX_BATCH = 16
_SLOT = "{expression}"


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """How questions are asked, in this process and in every worker.

    Attributes:
        backend: What runs bundles, where a setting says nothing else.
        backend_options: How the backend runs them.
        num_threads: With ONNX Runtime or OpenVINO: threads on a CPU; None: they decide.
        prompt: A template in place of the bundle's; None: the bundle's.
        seed: Seed of random orders.
        grammar: How answers are constrained; None: not at all.
    """

    backend: BackendName = "onnxruntime"
    backend_options: BackendOptions = DEFAULT_BACKEND
    num_threads: int | None = None
    prompt: str | None = None
    seed: int = 0
    grammar: GrammarName | None = None


class Runner(AbstractContextManager["Runner"]):
    """Answers shards; a context manager, and an ``Executor`` in this process.

    One bundle is open at a time, with a session for each setting that asks it: shards of one bundle
    are best given one after the other.
    """

    def __init__(self, options: RunnerOptions) -> None:
        """Nothing is opened yet."""
        self._options = options
        self._stack = ExitStack()
        self._opened: tuple[Bundle, RememberingBackend] | None = None
        self._key: tuple[Path, BackendName] | None = None
        self._max_batch = MAX_BATCH
        self._sessions: dict[str, GroundingSession] = {}

    def __exit__(self, *error: object) -> None:
        """Close what is open."""
        self.close()

    def close(self) -> None:
        """Close what is open; the next shard opens its bundle again."""
        self._opened = self._key = None
        self._sessions.clear()
        self._stack.close()

    def run(self, shards: Sequence[Shard]) -> Iterator[tuple[Shard, list[Record]]]:
        """Answer shards in the order given, and close what was opened.

        Yields:
            A shard and one record for each of its questions, in their order.
        """
        with self:
            for shard in shards:
                yield shard, self.answer(shard)

    def answer(self, shard: Shard) -> list[Record]:
        """One record for each question, in their order.

        An image that cannot be read, and an expression that the model refuses, are records with
        an error.

        Raises:
            GapExportError: the bundle cannot be run, or what it computes is not numbers.
        """
        session = self.session(shard.setting)
        records: list[Record] = []
        for _, group in groupby(shard.questions, key=lambda question: question.image_id):
            asked = list(group)
            try:
                image = asked[0].image.load()
            except ImageError as err:
                records += [_failed(question, err) for question in asked]
                continue
            for start in range(0, len(asked), self._max_batch):
                batch = asked[start : start + self._max_batch]
                records += _answer_batch(session, image, batch)
        return records

    def session(self, setting: Setting) -> GroundingSession:
        """The session of a setting, which stays open until another bundle is asked.

        Raises:
            GapExportError: the bundle cannot be run.
        """
        name = setting.backend or self._options.backend
        if self._opened is None or self._key != (setting.bundle, name):
            self.close()
            self._opened = self._open(open_bundle(setting.bundle), name)
            self._key = (setting.bundle, name)
        bundle, backend = self._opened
        if setting.name not in self._sessions:
            manifest = with_prompt(bundle.manifest, self._options.prompt)
            self._sessions[setting.name] = GroundingSession(
                manifest,
                bundle.path,
                backend,
                positions=setting.rule,
                edit_row=edit_of(setting, manifest, seed=self._options.seed),
                grammar=self._options.grammar,
            )
        return self._sessions[setting.name]

    def _open(self, bundle: Bundle, name: BackendName) -> tuple[Bundle, RememberingBackend]:
        if name == "tensorrt":
            from gap_export.runtime.backends.tensorrt_backend import TensorRTBackend

            engines = TensorRTBackend.open(bundle, engines=self._options.backend_options.engines)
            self._max_batch = min(MAX_BATCH, engines.max_batch)
            return bundle, self._remembering(engines)
        self._max_batch = MAX_BATCH
        threads = self._options.num_threads
        if name == "openvino":
            from gap_export.runtime.backends.openvino_backend import OpenVinoBackend

            openvino = OpenVinoBackend(
                bundle, self._options.backend_options.openvino, num_threads=threads
            )
            return bundle, self._remembering(openvino)
        from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend

        form = self._options.backend_options.form
        return bundle, self._remembering(OnnxRuntimeBackend(bundle, None, threads, form=form))

    def _remembering(self, backend: Backend) -> RememberingBackend:
        return self._stack.enter_context(RememberingBackend(backend))


def edit_of(setting: Setting, manifest: Manifest, *, seed: int) -> EditRow | None:
    """What a setting changes in what is fed; None where it is fed as pruning leaves it."""
    misalignment = misalignment_of(setting, manifest, seed=seed)
    if misalignment is not None:
        return misalignment.edit
    is_own = manifest.pruning.attention == "plain" or setting.positions == "gap+proportional"
    return None if is_own else count_as_one


def misalignment_of(setting: Setting, manifest: Manifest, *, seed: int) -> Misalignment | None:
    """What a setting does to positions; None where they are those that pruning leaves."""
    if setting.positions == "permuted":
        return Misalignment(kind="permuted", seed=seed)
    if setting.positions == "shifted":
        return Misalignment(kind="shifted", shift=default_shift(manifest.grid))
    return None


def default_shift(grid: GridSpec) -> int:
    """By how much ``shifted`` moves ids: half a row of the grid, at least 1."""
    return max(1, grid.cols // 2)


def with_prompt(manifest: Manifest, template: str | None) -> Manifest:
    """The manifest with another prompt; itself where there is none.

    A pruner that reads the question reads that of the other prompt; see :func:`check_prompt`.
    """
    if template is None:
        return manifest
    prompt, tower = replace(manifest.prompt, template=template), manifest.text_encoder
    if tower is not None and manifest.pruning.pruner_text == "question":
        question = prompt.question_template()
        assert question is not None, "check_prompt has seen to it"
        tower = replace(tower, template=question)
    return replace(manifest, prompt=prompt, text_encoder=tower)


def check_prompt(template: str, spec: PromptSpec, *, reads_question: bool = False) -> None:
    """Refuse a template that cannot stand in for a model's own.

    Raises:
        UsageError: the image token or the expression is not in it once, nothing follows the image,
            it is no text, or a pruner does not find the question.
    """
    counts = {name: template.count(name) for name in (spec.image_token, _SLOT)}
    wrong = [f"{name} {times} times" for name, times in counts.items() if times != 1]
    if not wrong and template.rstrip().endswith(spec.image_token):
        wrong = [f"nothing after {spec.image_token}"]
    if any("\ud800" <= character <= "\udfff" for character in template):
        wrong.append("half characters (surrogates)")
    if wrong:
        raise UsageError(
            "the prompt cannot be used",
            seen=f"{', '.join(wrong)} in {template!r}",
            allowed=f"text that holds {spec.image_token} and {_SLOT} once each, and does not end "
            f"with the former, e.g. {spec.template!r}",
        )
    marks = spec.question
    if reads_question and marks and replace(spec, template=template).question_template() is None:
        raise UsageError(
            "the pruner reads the question, which is not found in this prompt",
            seen=repr(template),
            allowed=f"the expression between {marks.start!r} and {marks.end!r}, and the image as "
            f"{marks.image!r}",
            fix="write the prompt so, or use --pruner-text expression",
        )


def _answer_batch(
    session: GroundingSession, image: ImageInput, questions: Sequence[AnyQuestion]
) -> list[Record]:
    remembering = session.backend
    assert isinstance(remembering, RememberingBackend), "the runner opened it"
    remembering.forget_saved()
    try:
        answers = session.ground_batch(
            image,
            [question.expression for question in questions],
            frame=questions[0].image.frame,
        )
    except ImageError as err:
        return [_failed(question, err) for question in questions]
    except ComputationError as err:
        # It ends the evaluation: a model that computes this has no accuracy.
        raise ComputationError(
            err.what, seen=f"{err.seen}; asked {questions[0].id}", allowed=err.allowed, fix=err.fix
        ) from err
    except ExpressionError as err:
        if len(questions) == 1:
            return [_failed(questions[0], err)]
        # Questions are asked one by one, so that only the refused one has no answer.
        return [record for one in questions for record in _answer_batch(session, image, [one])]
    # Each setting is told what it would have taken by itself.
    times = dict(answers[0].timings_ms)
    for stage, saved in remembering.saved_ms.items():
        times[stage] += saved
        times["total"] += saved
    records = []
    for question, answer in zip(questions, answers, strict=True):
        parsed = parse_answer(answer.text, session.manifest.box)
        record = Record(
            question_id=question.id,
            text=answer.text,
            fractions=None if parsed is None else parsed.fractions,
            box=answer.box,
            image_size=answer.image_size,
            orientation=answer.orientation,
            num_kept_tokens=len(answer.keep_indices),
            num_visual_tokens=answer.num_visual_tokens,
            timings_ms={stage: round(value, 3) for stage, value in times.items()},
            batch_size=len(questions),
            cut_off=not has_ended(answer.token_ids, session.manifest),
            backend=answer.backend,
            score=answer.score,
        )
        records.append(record)
    return records


def _failed(question: AnyQuestion, err: GapExportError) -> Record:
    return Record(
        question_id=question.id,
        text="",
        fractions=None,
        box=None,
        image_size=(0, 0),
        num_kept_tokens=0,
        num_visual_tokens=0,
        error=str(err),
        fault="broken picture" if isinstance(err, ImageError) else "refused expression",
    )
