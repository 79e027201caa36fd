"""The work of an evaluation: what is refused before it, asking every setting, and summing up."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

from gap_export.bundle import open_bundle
from gap_export.errors import UsageError
from gap_export.evaluation.absence import judge_absence
from gap_export.evaluation.datasets import open_dataset
from gap_export.evaluation.datasets.refshapes_set import NAME as REFSHAPES
from gap_export.evaluation.doubts import find_doubts
from gap_export.evaluation.drawn import drawn_name
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
from gap_export.evaluation.run import IN_PROCESS, Run, make_folder, open_executor
from gap_export.evaluation.settings import (
    MISALIGNMENTS,
    MisalignmentKind,
    Setting,
    describe_attention,
    describe_positions,
    pruned_settings,
    smaller_setting,
    whole_arms,
    whole_settings,
)
from gap_export.evaluation.smaller_image import count_stages, mean_text_length
from gap_export.evaluation.summary import Answered, Judging
from gap_export.evaluation.workers import Executor
from gap_export.families import native_protocol
from gap_export.outputs import NO_RULE, OutputRule
from gap_export.progress import Progress
from gap_export.runtime.drawing import draw_grounding, save_drawing
from gap_export.spec.manifest import BoxSpec, Manifest, PromptSpec
from gap_export.spec.requests import GrammarName

# Number of expressions asked of a data set that has no end.
DEFAULT_SAMPLES = 500
ALL = 0
NO_SMALLER: Mapping[Path, Path] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class Asking:
    """What is asked, who answers, and how answers are judged.

    Attributes:
        data: A data set, see ``gap_export.evaluation.datasets``.
        protocol: Its name; ``native`` for that of the model's authors, see
            :func:`gap_export.evaluation.protocols.resolve_protocol`.
        prompt: A template in place of the model's; None: the model's.
        misaligned: What is done to the positions of the unpruned model, in settings of their own.
        grammar: ``box`` constrains every answer, see ``GroundingSession``; None: answers are free.
        records: A folder for the answers, made where it does not exist; what it holds is not asked
            again. None: they are not kept.
        workers: Who answers, see :func:`gap_export.evaluation.run.open_executor`.
        pictures: A folder that is made, for a drawing of each setting's first answer: box, kept
            tokens and, where the pruner has scores, their heat map.
        rule: What those drawings must stay away from.
        absent: Of what is drawn: share of expressions whose object is not there.
    """

    data: str = REFSHAPES
    protocol: str = "native"
    prompt: str | None = None
    misaligned: tuple[MisalignmentKind, ...] = ()
    grammar: GrammarName | None = None
    records: Path | None = None
    workers: str = IN_PROCESS
    pictures: Path | None = None
    rule: OutputRule = NO_RULE
    absent: float = 0.0


DEFAULT_ASKING = Asking()
_CONSTRAINED: Mapping[str | None, str] = {
    "box": "; answers are constrained to hold a well-formed box (grammar box)"
}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What a recipe and a manifest both say of a model, and whether a pruner reads the question."""

    family: str
    prompt: PromptSpec
    box: BoxSpec
    reads_question: bool


@dataclass(frozen=True, kw_only=True)
class Job:
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
        asked: ModelFacts,
        num_samples: int | None,
        progress: Progress,
    ) -> Job:
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
        if num_samples is None and drawn_name(asking.data) is not None:
            num_samples = DEFAULT_SAMPLES
        with progress.stage("opening the data set"):
            # 0 and None are all there are.
            dataset = open_dataset(
                asking.data, samples=num_samples or None, seed=runner.seed, absent=asking.absent
            )
        for what, folder in (("records", asking.records), ("drawings", asking.pictures)):
            if folder is not None:
                make_folder(folder, what)
        return cls(
            asking=asking, runner=runner, dataset=dataset, protocol=protocol, executor=executor
        )

    def measure(
        self,
        whole: Path,
        pruned: Sequence[Path],
        progress: Progress,
        *,
        smaller: Mapping[Path, Path] = NO_SMALLER,
    ) -> EvaluationReport:
        """Ask the unpruned bundle and the pruned ones, and sum up.

        Args:
            whole: All tokens.
            pruned: Some.
            progress: Progress reporter.
            smaller: By pruned bundle the one of a smaller image, all tokens of which are kept.
        """
        # A worker may be in another folder.
        whole, pruned = whole.absolute(), [path.absolute() for path in pruned]
        smaller = {path.absolute(): rival.absolute() for path, rival in smaller.items()}
        manifest = open_bundle(whole).manifest
        axes = manifest.decoder.position_axes
        arms = (*whole_arms(axes), *dict.fromkeys(self.asking.misaligned))
        unpruned = whole_settings(whole, arms)
        settings = list(unpruned)
        for path in pruned:
            pruning = open_bundle(path).manifest.pruning
            settings += pruned_settings(path, pruning, position_axes=axes)
            rival = smaller.get(path)
            # One that several pruners compete with is asked once, behind the first of them.
            if rival is not None and rival not in {one.bundle for one in settings}:
                settings.append(smaller_setting(rival, open_bundle(rival).manifest.image))
        drawings: dict[str, Path] = {}
        if self.asking.pictures is not None:
            drawings = {one.name: self.asking.pictures / f"{one.slug}.png" for one in settings}
            self.asking.rule.check({f"the drawing of {name}": p for name, p in drawings.items()})
        with tempfile.TemporaryDirectory(prefix="gap-export-records-") as scratch:
            folder = self.asking.records or Path(scratch)
            run = Run(settings=settings, dataset=self.dataset, options=self.runner, folder=folder)
            answers = run.answers(self.executor, progress)
        if drawings:
            self._draw(settings, answers, manifest, drawings)
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
                # Boxes in pixels are of the image that the model was shown.
                box = open_bundle(setting.bundle).manifest.box if smaller else manifest.box
                own = replace(judging, box_spec=box)
                judged.append(own.judge(setting, answers[setting.name]))
                row = own.row(judged[-1], rows[0].acc_at_50 if rows else None)
                absence = judge_absence(
                    self.dataset.asked, answers[setting.name], seed=self.runner.seed
                )
                rows.append(replace(row, absence=absence))
                advance(1)
            if smaller:
                rows = self._with_costs(rows, settings, manifest.grid.num_visual_tokens)
        comparisons, gallery = _compare(judging, judged, smaller, num_whole=len(unpruned))
        return EvaluationReport(
            model=manifest.model.name,
            family=manifest.model.family,
            data=_summarize(
                self.dataset, (*unusable, *failed_questions(seen.questions, answers)), answers
            ),
            protocol=self.protocol.name,
            protocol_summary=self.protocol.summary + _CONSTRAINED.get(self.runner.grammar, ""),
            prompt=with_prompt(manifest, self.asking.prompt).prompt.template,
            seed=self.runner.seed,
            backend=self.runner.backend,
            misalignments={
                **describe_positions(axes),
                **describe_attention(settings),
                **{
                    setting.name: done.describe()
                    for setting in unpruned
                    if (done := misalignment_of(setting, manifest, seed=self.runner.seed))
                },
            },
            warnings=find_doubts(judged[0].records, manifest.box, accuracy=rows[0].acc_at_50),
            rows=tuple(rows),
            comparisons=comparisons,
            gallery=gallery,
        )

    def _with_costs(
        self, rows: Sequence[SettingRow], settings: Sequence[Setting], num_per_image: int
    ) -> list[SettingRow]:
        """Rows with what was multiplied on average, by graphs and lengths of prompts."""
        expressions = [question.expression for question in self.dataset.questions]
        text = mean_text_length(settings[0].bundle, expressions, self.asking.prompt)
        # Tiles of an image; they are as many for all that keep of the same image.
        images = rows[0].mean_visual_tokens / num_per_image
        found = []
        for row, setting in zip(rows, settings, strict=True):
            per_image = open_bundle(setting.bundle).manifest.image.tiles is None
            costs = count_stages(
                setting.bundle,
                num_images=1 if per_image else images,
                prompt_length=text + row.mean_visual_tokens,
            )
            found.append(replace(row, multiply_adds=costs))
        return found

    def _draw(
        self,
        settings: Sequence[Setting],
        answers: Mapping[str, Mapping[str, Record]],
        manifest: Manifest,
        drawings: Mapping[str, Path],
    ) -> None:
        """Draw each setting's answer to the first question that could be asked."""
        given = answers[settings[0].name]
        first = next((one for one in self.dataset.questions if given[one.id].error is None), None)
        if first is None:
            return
        with Runner(self.runner) as runner:
            for setting in settings:
                image, frame = first.image.load(), first.image.frame
                answer = runner.session(setting).ground(image, first.expression, frame=frame)
                drawing = draw_grounding(
                    image, answer, pad_color=manifest.image.pad_color, frame=frame
                )
                save_drawing(drawing, drawings[setting.name], rule=self.asking.rule)


def _compare(
    judging: Judging, judged: Sequence[Answered], smaller: Mapping[Path, Path], *, num_whole: int
) -> tuple[tuple[Comparison, ...], tuple[GalleryItem, ...]]:
    """Misaligned and GAP beside unpruned, GAP beside its rivals; the first GAP row's gallery."""
    unpruned, *misaligned = judged[:num_whole]
    by_bundle = {
        bundle: list(group)
        for bundle, group in groupby(judged[num_whole:], key=lambda one: one.setting.bundle)
    }
    rivals = {path: by_bundle[rival] for path, rival in smaller.items()}
    bundles = [group for path, group in by_bundle.items() if path not in smaller.values()]
    comparisons = [judging.compare(unpruned, one) for one in misaligned]
    for *naive, gap in bundles:
        others = (*naive, *rivals.get(gap.setting.bundle, []))
        comparisons += [judging.compare(gap, one) for one in others]
        comparisons.append(judging.compare(unpruned, gap))
    compact, *_, gap = bundles[0]
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
        num_absent=len(dataset.absent),
    )
