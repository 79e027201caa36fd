"""From which score on is an object there? Measured on expressions of which some have no object."""

from __future__ import annotations

from dataclasses import dataclass

from gap_export.bundle import Bundle
from gap_export.bundle.calibration import Calibration, manifest_sha256
from gap_export.errors import UsageError
from gap_export.evaluation.absence import ScoredAnswers, curve_points, summarize, trace_curve
from gap_export.evaluation.datasets import open_dataset
from gap_export.evaluation.datasets.refshapes_set import NAME as REFSHAPES
from gap_export.evaluation.drawn import drawn_name
from gap_export.evaluation.measure import Runner, RunnerOptions
from gap_export.evaluation.questions import Dataset
from gap_export.evaluation.records import Record
from gap_export.evaluation.settings import Setting
from gap_export.evaluation.workers import cut_shards
from gap_export.progress import Progress
from gap_export.version import __version__

DEFAULT_SAMPLES = 500
# Another one than an evaluation's, so that no threshold is judged on the scenes it is from.
DEFAULT_SEED = 1
# As many that are not there as there are.
DEFAULT_ABSENT = 0.5
# With fewer one answer moves a rate by more than its interval would say.
_MIN_OF_A_KIND = 20


@dataclass(frozen=True, kw_only=True)
class CalibrationData:
    """What a bundle is asked.

    Attributes:
        data: As of :class:`gap_export.evaluation.job.Asking`.
        samples: Expressions whose object is there, of what is drawn; of other data the first
            so many of each split. None: 500 of what is drawn, else all.
        absent: Of what is drawn: share of expressions whose object is not there; None: 0.5.
        recall: Share of the objects that are there to be found, in (0, 1].
        seed: Of the scenes, and of the intervals.
    """

    data: str = REFSHAPES
    samples: int | None = None
    absent: float | None = None
    recall: float = 0.95
    seed: int = DEFAULT_SEED

    def open(self) -> Dataset:
        """The data set.

        Raises:
            UsageError: it cannot be used, too little of it is or is not there, or ``recall`` is no
                share.
        """
        if not 0 < self.recall <= 1:
            raise UsageError("no such recall", seen=self.recall, allowed="above 0, up to 1")
        is_drawn = drawn_name(self.data) is not None
        samples = DEFAULT_SAMPLES if self.samples is None and is_drawn else self.samples
        absent = DEFAULT_ABSENT if self.absent is None and is_drawn else self.absent or 0.0
        found = open_dataset(self.data, samples=samples, seed=self.seed, absent=absent)
        if min(len(found.questions), len(found.absent)) < _MIN_OF_A_KIND:
            raise UsageError(
                "too few expressions to find a threshold",
                seen=f"{len(found.questions)} of objects that are there, {len(found.absent)} of "
                "objects that are not",
                allowed=f"at least {_MIN_OF_A_KIND} of each",
                fix="give more of them: in questions.jsonl those that are not there have a box of "
                "null",
            )
        return found


def calibrate_bundle(
    bundle: Bundle,
    asked: CalibrationData,
    runner: RunnerOptions,
    progress: Progress,
) -> Calibration:
    """Ask a bundle, and find the highest threshold at which ``recall`` is reached.

    Raises:
        UsageError: see :meth:`CalibrationData.open`; or so many answers hold no box that the recall
            is not reached at any threshold.
    """
    with progress.stage("opening the data set"):
        dataset = asked.open()
    pruning = bundle.manifest.pruning
    setting = Setting(
        name="calibration",
        bundle=bundle.path,
        pruner=pruning.pruner,
        keep_ratio=pruning.keep_ratio,
        positions=pruning.positions,
    )
    shards = cut_shards(setting, dataset.asked)
    records: dict[str, Record] = {}
    with progress.stage("asking the bundle", total=len(dataset.asked)) as advance:
        for _, answers in Runner(runner).run(shards):
            records |= {record.question_id: record for record in answers}
            advance(len(answers))
    scored = ScoredAnswers.of(dataset.asked, records)
    if scored is None or not scored.scores.any():
        raise UsageError("no answer of the bundle holds a box", seen=f"{len(records)} answers")
    found, curve = summarize(scored, seed=asked.seed, recall=asked.recall), trace_curve(scored)
    if found.recall < asked.recall:
        raise UsageError(
            "the recall is reached at no threshold: too many answers hold no box",
            seen=f"{found.recall:.3f} at most",
            allowed=f"{asked.recall:g}",
            fix=f"ask for less: --recall {found.recall:.2f}",
        )
    return Calibration(
        bundle_sha256=manifest_sha256(bundle),
        threshold=found.threshold,
        target_recall=asked.recall,
        recall=found.recall,
        false_box_rate=found.false_box_rate,
        auroc=found.auroc,
        auroc_ci95=found.auroc_ci95,
        expected_calibration_error=found.calibration_error,
        roc=curve_points(curve),
        num_present=found.num_present,
        num_absent=found.num_absent,
        data=dataset.spec,
        data_sha256=dataset.fingerprint,
        seed=asked.seed,
        backend=next(record.backend for record in records.values() if record.backend),
        positions=pruning.positions,
        grammar=runner.grammar,
        gap_export_version=__version__,
    )
