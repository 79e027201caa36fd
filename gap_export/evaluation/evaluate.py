"""How well a model grounds: unpruned, pruned with compact positions, pruned with GAP.

Every setting is asked the same questions. A compact setting is the *same graph* as the GAP one,
fed ``kept_positions = arange(P)``: nothing else differs. A misaligned setting is the graph of the
unpruned model, fed wrong positions: no token is dropped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import resolve_model, resolve_source
from gap_export.errors import UsageError
from gap_export.evaluation.baseline import check_baseline, dtype_of, quantization_of
from gap_export.evaluation.calibration import refshapes_questions
from gap_export.evaluation.datasets import open_dataset
from gap_export.evaluation.datasets.refshapes_set import NAME as REFSHAPES
from gap_export.evaluation.doubts import find_doubts
from gap_export.evaluation.faults import compare_with_images, failed_questions
from gap_export.evaluation.measure import (
    Runner,
    RunnerOptions,
    check_prompt,
    misalignment_of,
    with_prompt,
)
from gap_export.evaluation.protocols import Protocol, resolve_protocol
from gap_export.evaluation.questions import Dataset, Unusable
from gap_export.evaluation.records import Record
from gap_export.evaluation.results import (
    Comparison,
    DataSummary,
    EvaluationReport,
    GalleryItem,
    SettingRow,
)
from gap_export.evaluation.run import IN_PROCESS, Run, make_folder, open_executor, records_folder
from gap_export.evaluation.settings import (
    MISALIGNMENTS,
    MisalignmentKind,
    Setting,
    pruned_settings,
    whole_settings,
)
from gap_export.evaluation.summary import Answered, Judging
from gap_export.evaluation.workers import Executor
from gap_export.exporting import (
    ExportOptions,
    GraphCache,
    export_checkpoint,
    export_model,
    resolve_options,
)
from gap_export.families import native_protocol
from gap_export.outputs import NO_RULE, OutputRule
from gap_export.parity.patched.check import was_patched
from gap_export.progress import Progress, SilentProgress
from gap_export.runtime.backends.onnxruntime_backend import numpy_dtype
from gap_export.runtime.drawing import draw_grounding, save_drawing
from gap_export.runtime.session import BackendName
from gap_export.spec.manifest import BoxSpec, Manifest, PromptSpec, PruningSpec
from gap_export.spec.requests import PruningRequest

# Number of expressions asked of a data set that has no end.
DEFAULT_SAMPLES = 500
ALL = 0


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What is asked, who answers, and how answers are judged.

    Attributes:
        data: A data set, see ``gap_export.evaluation.datasets``.
        protocol: Its name; ``native`` for that of the model's authors, see
            :func:`gap_export.evaluation.protocols.resolve_protocol`.
        prompt: A template in place of the model's; None: the model's.
        misaligned: What is done to the positions of the unpruned model, in settings of their own.
        records: A folder for the answers, made where it does not exist; what it holds is not asked
            again. None: they are not kept.
        workers: Who answers, see :func:`gap_export.evaluation.run.open_executor`.
        pictures: A folder that is made, for a drawing of each setting's first answer: box, kept
            tokens and, where the pruner has scores, their heat map.
        rule: What those drawings must stay away from.
    """

    data: str = REFSHAPES
    protocol: str = "native"
    prompt: str | None = None
    misaligned: tuple[MisalignmentKind, ...] = ()
    records: Path | None = None
    workers: str = IN_PROCESS
    pictures: Path | None = None
    rule: OutputRule = NO_RULE


def evaluate_model(
    options: ExportOptions,
    *,
    prunings: Sequence[PruningRequest] = (),
    num_samples: int | None = None,
    asking: Asking = Asking(),
    progress: Progress | None = None,
) -> EvaluationReport:
    """Export a model for every pruning, and measure each beside the unpruned model.

    Args:
        options: Which model, and how it is exported; its folder is not read. The seed of its
            pruning is also that of the samples and of random orders.
        prunings: What is measured; empty for the options' own. Each is measured with both modes of
            positions, whichever it names.
        num_samples: Expressions to ask, the first of the data set; 0 for all; None for 500 of
            RefShapes, and all of any other.
        asking: What is asked, and how.
        progress: Progress reporter.

    Returns:
        One unpruned row, one for each misalignment, then a compact and a GAP row for every
        configuration.

    Raises:
        UsageError: what ``export_model`` refuses; the data set, the protocol, the prompt, the
            records or the workers cannot be used.
    """
    progress = progress or SilentProgress()
    if options.dtype is not None:
        numpy_dtype(options.dtype)
    found, _ = resolve_model(options.model, recipe=options.recipe, parts=options.checkpoint)
    base = replace(options, out=None)
    runs: dict[tuple[str, float], tuple[PruningSpec, ExportOptions]] = {}
    for request in prunings or (options.pruning,):
        run = replace(base, pruning=replace(request, positions="gap"))
        # All of them now: a slip in the last must not cost the measuring of those before it.
        pruning = resolve_options(found, run)
        key = (pruning.pruner, pruning.keep_ratio)
        if runs.setdefault(key, (pruning, run))[0] != pruning:
            raise UsageError(
                "two prunings would have the same name in the report",
                seen=f"{pruning.pruner} at keep {pruning.keep_ratio:g}, twice and not alike",
                fix="measure them one after the other",
            )
    reads_question = any(pruning.pruner_text == "question" for pruning, _ in runs.values())
    seed = options.pruning.seed
    runner = RunnerOptions(prompt=asking.prompt, seed=seed)
    asked = _Asked(
        family=found.family, prompt=found.prompt, box=found.box, reads_question=reads_question
    )
    job = _Job.prepare(asking, runner, asked, num_samples, progress)
    with tempfile.TemporaryDirectory(prefix="gap-export-eval-") as scratch:
        cache = GraphCache()
        # With all tokens in raster order nothing is pruned, in any order of the pruned ones.
        unpruned = replace(
            base,
            pruning=PruningRequest(keep_ratio=1.0, order="raster", seed=seed),
            out=Path(scratch) / "unpruned",
        )
        whole = export_model(unpruned, progress=progress, cache=cache).bundle
        pruned = [
            export_model(
                replace(run, out=Path(scratch) / str(number)), progress=progress, cache=cache
            ).bundle
            for number, (_, run) in enumerate(runs.values())
        ]
        return job.measure(whole, pruned, progress)


def evaluate_bundle(
    bundle: Path,
    *,
    baseline: Path | None = None,
    checkpoint: Mapping[str, Path] | None = None,
    seed: int = 0,
    num_samples: int | None = None,
    asking: Asking = Asking(),
    backend: BackendName = "onnxruntime",
    engines: str | None = None,
    progress: Progress | None = None,
) -> EvaluationReport:
    """Measure a bundle, compact and GAP, beside its unpruned model.

    Args:
        bundle: The bundle.
        baseline: A bundle of the same model with keep ratio 1.0; else the unpruned model is
            exported from the bundle's checkpoint, in the bundle's dtype and quantized as it is, so
            that pruning alone is between the two.
        checkpoint: Parts of the source checkpoint by role, where they have been moved.
        seed: Seed of the samples and of random orders.
        num_samples: As of :func:`evaluate_model`.
        asking: What is asked, and how.
        backend: What runs the bundle; the unpruned model runs in ONNX Runtime in any case.
        engines: With TensorRT: which of the bundle's engines.
        progress: Progress reporter.

    Raises:
        UsageError: no unpruned model can be had, ``baseline`` is of another model or pruned; the
            data set, the protocol, the prompt, the records or the workers cannot be used.
    """
    progress = progress or SilentProgress()
    manifest = open_bundle(bundle).manifest
    if baseline is None and was_patched(manifest):
        raise UsageError(
            "the bundle was patched from an ONNX export: no checkpoint gives its unpruned model",
            seen="no baseline",
            fix="patch that export once more with --keep 1, and name the bundle: --baseline",
        )
    runner = RunnerOptions(backend=backend, engines=engines, prompt=asking.prompt, seed=seed)
    asked = _Asked(
        family=manifest.model.family,
        prompt=manifest.prompt,
        box=manifest.box,
        reads_question=manifest.pruning.pruner_text == "question",
    )
    job = _Job.prepare(asking, runner, asked, num_samples, progress)
    # What cannot run here is refused before the unpruned model is made and measured.
    with Runner(runner) as attempt:
        attempt.check(pruned_settings(bundle, manifest.pruning)[-1])
    with tempfile.TemporaryDirectory(prefix="gap-export-eval-") as scratch:
        if baseline is None:
            recipe, source = resolve_source(manifest, checkpoint or {})
            quantization = quantization_of(manifest)
            calibrates = quantization is not None and quantization.method == "awq"
            options = ExportOptions(
                model=recipe.name,
                pruning=PruningRequest(keep_ratio=1.0),
                dtype=dtype_of(manifest),
                quantization=quantization,
                calibration=tuple(refshapes_questions()) if calibrates else None,
                out=Path(scratch) / "unpruned",
            )
            baseline = export_checkpoint(recipe, source, options, progress=progress).bundle
        check_baseline(manifest, open_bundle(baseline).manifest)
        return job.measure(baseline, [bundle], progress)


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What a recipe and a manifest both say of a model, and whether a pruner reads the question."""

    family: str
    prompt: PromptSpec
    box: BoxSpec
    reads_question: bool


@dataclass(frozen=True, kw_only=True)
class _Job:
    """All that is known before anything is exported or asked."""

    asking: Asking
    runner: RunnerOptions
    dataset: Dataset
    protocol: Protocol
    executor: Executor

    @classmethod
    def prepare(
        cls,
        asking: Asking,
        runner: RunnerOptions,
        asked: _Asked,
        num_samples: int | None,
        progress: Progress,
    ) -> _Job:
        """Refuse what cannot be done before the work."""
        if num_samples is not None and num_samples < ALL:
            raise UsageError("too few samples", seen=num_samples, allowed=">= 1, or 0 for all")
        unknown = [kind for kind in asking.misaligned if kind not in MISALIGNMENTS]
        if unknown:
            raise UsageError(
                "no such misalignment", seen=", ".join(unknown), allowed=", ".join(MISALIGNMENTS)
            )
        protocol = resolve_protocol(asking.protocol, native_protocol(asked.family), asked.box)
        if asking.prompt is not None:
            check_prompt(asking.prompt, asked.prompt, reads_question=asked.reads_question)
        executor = open_executor(asking.workers, runner, progress)
        if num_samples is None and asking.data.partition(":")[0] == REFSHAPES:
            num_samples = DEFAULT_SAMPLES
        with progress.stage("opening the data set"):
            # 0 and None are all there are.
            dataset = open_dataset(asking.data, samples=num_samples or None, seed=runner.seed)
        for what, folder in (("records", asking.records), ("drawings", asking.pictures)):
            if folder is not None:
                make_folder(folder, what)
        return cls(
            asking=asking, runner=runner, dataset=dataset, protocol=protocol, executor=executor
        )

    def measure(self, whole: Path, pruned: Sequence[Path], progress: Progress) -> EvaluationReport:
        """Ask the unpruned bundle and the pruned ones, and sum up."""
        # A worker may be in another folder.
        whole, pruned = whole.absolute(), [path.absolute() for path in pruned]
        manifest = open_bundle(whole).manifest
        unpruned = whole_settings(whole, ("none", *dict.fromkeys(self.asking.misaligned)))
        pairs = [pruned_settings(path, open_bundle(path).manifest.pruning) for path in pruned]
        settings = [*unpruned, *(setting for pair in pairs for setting in pair)]
        if self.asking.pictures is not None:
            drawings = _drawing_paths(settings, self.asking.pictures)
            self.asking.rule.check({f"the drawing of {name}": p for name, p in drawings.items()})
        with records_folder(self.asking.records) as folder:
            run = Run(settings=settings, dataset=self.dataset, options=self.runner, folder=folder)
            answers = run.answers(self.executor, progress)
        if self.asking.pictures is not None:
            self._draw(settings, answers, manifest, self.asking.pictures)
        seen = compare_with_images(self.dataset.questions, answers)
        unusable = (*self.dataset.unusable, *seen.unusable)
        with progress.stage("summing up", total=len(settings)) as advance:
            judging = Judging(
                questions=seen.questions,
                unusable=unusable,
                protocol=self.protocol,
                box_spec=manifest.box,
                model=manifest.model.name,
                seed=self.runner.seed,
            )
            judged: list[Answered] = []
            rows: list[SettingRow] = []
            for setting in settings:
                judged.append(judging.judge(setting, answers[setting.name]))
                rows.append(judging.row(judged[-1], rows[0].acc_at_50 if rows else None))
                advance(1)
        comparisons, gallery = _compare(judging, judged, num_whole=len(unpruned))
        return EvaluationReport(
            model=manifest.model.name,
            family=manifest.model.family,
            data=_summarize(
                self.dataset, (*unusable, *failed_questions(seen.questions, answers)), answers
            ),
            protocol=self.protocol.name,
            protocol_summary=self.protocol.summary,
            prompt=with_prompt(manifest, self.asking.prompt).prompt.template,
            seed=self.runner.seed,
            backend=self.runner.backend,
            misalignments=self._misalignments(unpruned, manifest),
            warnings=find_doubts(judged[0].records, manifest.box, accuracy=rows[0].acc_at_50),
            rows=tuple(rows),
            comparisons=comparisons,
            gallery=gallery,
        )

    def _misalignments(self, settings: Sequence[Setting], manifest: Manifest) -> dict[str, str]:
        found = {
            setting.name: misalignment_of(setting, manifest, seed=self.runner.seed)
            for setting in settings
        }
        return {name: done.describe() for name, done in found.items() if done is not None}

    def _draw(
        self,
        settings: Sequence[Setting],
        answers: Mapping[str, Mapping[str, Record]],
        manifest: Manifest,
        folder: Path,
    ) -> None:
        """Draw each setting's answer to the first question that could be asked."""
        given = answers[settings[0].name]
        first = next((one for one in self.dataset.questions if given[one.id].error is None), None)
        if first is None:
            return
        paths = _drawing_paths(settings, folder)
        with Runner(self.runner) as runner:
            for setting in settings:
                answer = runner.ground(setting, first)
                drawing = draw_grounding(
                    first.image.load(),
                    answer,
                    pad_color=manifest.image.pad_color,
                    frame=first.image.frame,
                )
                save_drawing(drawing, paths[setting.name], rule=self.asking.rule)


def _drawing_paths(settings: Sequence[Setting], folder: Path) -> dict[str, Path]:
    """Where a drawing of each setting goes, by its name."""
    return {setting.name: folder / f"{setting.slug}.png" for setting in settings}


def _compare(
    judging: Judging, judged: Sequence[Answered], *, num_whole: int
) -> tuple[tuple[Comparison, ...], tuple[GalleryItem, ...]]:
    """Misaligned and GAP beside unpruned, GAP beside compact; the first GAP setting's gallery."""
    unpruned, *misaligned = judged[:num_whole]
    pairs = list(zip(judged[num_whole::2], judged[num_whole + 1 :: 2], strict=True))
    comparisons = [judging.compare(unpruned, one) for one in misaligned]
    for compact, gap in pairs:
        comparisons += [judging.compare(gap, compact), judging.compare(unpruned, gap)]
    compact, gap = pairs[0]
    return tuple(comparisons), judging.gallery(judged, compact=compact, gap=gap)


def _summarize(
    dataset: Dataset, unusable: tuple[Unusable, ...], answers: Mapping[str, Mapping[str, Record]]
) -> DataSummary:
    turned = {
        name
        for given in answers.values()
        for name, record in given.items()
        if record.orientation != 1
    }
    return DataSummary(
        spec=dataset.spec,
        name=dataset.name,
        layout=dataset.layout,
        splits=dataset.splits,
        num_expressions=dataset.num_expressions,
        num_images=len({question.image_id for question in dataset.questions}),
        frame=dataset.frame,
        num_turned=len({one.image_id for one in dataset.questions if one.id in turned}),
        num_excluded=sum(not one.counts_as_wrong for one in unusable),
        unusable=unusable,
        fingerprint=dataset.fingerprint,
    )
