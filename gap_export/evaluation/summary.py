"""From records to what a report says: rows, comparisons, and questions worth looking at."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from gap_export.evaluation.doubts import is_record_out_of_scale
from gap_export.evaluation.protocols import Protocol, applicable
from gap_export.evaluation.questions import Question, Unusable
from gap_export.evaluation.records import Record
from gap_export.evaluation.results import (
    Accuracy,
    Comparison,
    GalleryAnswer,
    GalleryItem,
    GalleryKind,
    Interval,
    SettingRow,
)
from gap_export.evaluation.settings import Setting
from gap_export.evaluation.statistics import bootstrap_interval, mcnemar
from gap_export.parity.metrics import paired_difference_interval, wilson_interval
from gap_export.runtime.boxes import parse_box
from gap_export.spec.manifest import BoxSpec

GALLERY_SIZE = 8
_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One expression of the denominator, judged.

    Attributes:
        image_id: Shared by expressions about one image.
        split: Its part of the data set.
        kind: Its type, where there are types.
        was_asked: False where there is no answer.
        iou: By the protocol, in 0..1; 0 where it read no box.
        parsed: Whether the protocol read a box.
        hit: Whether the answer is right at IoU 0.5.
        exact: Whether a box is written in the model's syntax. One that is parsed and not exact was
            read with tolerance.
    """

    image_id: str
    split: str
    kind: str | None
    was_asked: bool = False
    iou: float = 0.0
    parsed: bool = False
    hit: bool = False
    exact: bool = False


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One setting with its answers, judged: a record and a score for each question, in order."""

    setting: Setting
    records: tuple[Record, ...]
    scores: tuple[Score, ...]


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What all settings of an evaluation share.

    Attributes:
        questions: What was asked; those of one image stand together.
        unusable: What could not be asked.
        model: Recipe name.
        seed: Seed of the evaluation and of the bootstrap.
    """

    questions: Sequence[Question]
    unusable: Sequence[Unusable]
    protocol: Protocol
    box_spec: BoxSpec
    model: str
    seed: int

    def judge(self, setting: Setting, records: Mapping[str, Record]) -> Answered:
        """Score the answers of one setting, which are given by the ids of the questions."""
        ordered = tuple(records[question.id] for question in self.questions)
        scores = tuple(map(self._score, ordered, self.questions))
        return Answered(setting=setting, records=ordered, scores=scores)

    def _score(self, record: Record, question: Question) -> Score:
        iou = self.protocol.iou(record, question, self.box_spec)
        return Score(
            image_id=question.image_id,
            split=question.split,
            kind=question.kind,
            was_asked=record.error is None,
            iou=iou,
            parsed=self.protocol.read(record, self.box_spec) is not None,
            hit=self.protocol.is_hit(iou),
            exact=parse_box(record.text, self.box_spec) is not None,
        )

    def row(self, answered: Answered, unpruned: float | None) -> SettingRow:
        """One row of the report, beside the accuracy of the unpruned row, if it is not that row."""
        # An expression that could not be asked counts as answered wrongly.
        scores = [
            *answered.scores,
            *(
                Score(image_id=one.image_id, split=one.split, kind=one.kind)
                for one in self.unusable
                if one.counts_as_wrong
            ),
        ]
        whole = self._accuracy(scores)
        usable = [score for score in scores if score.was_asked]
        given = [record for record in answered.records if record.error is None]
        latency, batch_size = _latency(self.questions, answered.records)
        setting = answered.setting
        pairs = list(zip(answered.records, self.questions, strict=True))
        return SettingRow(
            **vars(whole),
            name=setting.name,
            model=self.model,
            pruner=setting.pruner,
            keep_ratio=setting.keep_ratio,
            pruner_text=setting.pruner_text,
            positions=setting.positions,
            seed=self.seed,
            protocol=self.protocol.name,
            recovered=whole.acc_at_50 / unpruned if unpruned else None,
            mean_visual_tokens=_mean(record.num_kept_tokens for record in given),
            num_unusable=len(scores) - len(usable),
            acc_at_50_usable=_mean(score.hit for score in usable) if usable else None,
            num_tolerant=sum(score.parsed and not score.exact for score in answered.scores),
            num_out_of_scale=sum(is_record_out_of_scale(one, self.box_spec) for one in given),
            num_cut_off=sum(record.cut_off for record in given),
            by_split=self._by(scores, lambda score: score.split),
            by_kind=self._by(scores, lambda score: score.kind),
            latency_ms=latency,
            mean_batch_size=batch_size,
            other_protocols={
                protocol.name: sum(
                    protocol.is_hit(protocol.iou(*pair, self.box_spec)) for pair in pairs
                )
                / len(scores)
                for protocol in applicable(self.box_spec)
                if protocol.name != self.protocol.name
            },
            backend="; ".join(dict.fromkeys(record.backend for record in given)),
        )

    def compare(self, first: Answered, second: Answered) -> Comparison:
        """Two settings over the same expressions."""
        hits = [
            (one.hit, other.hit) for one, other in zip(first.scores, second.scores, strict=True)
        ]
        both, only_first = hits.count((True, True)), hits.count((True, False))
        only_second = hits.count((False, True))
        # What could not be asked was answered correctly by neither.
        n = len(hits) + sum(one.counts_as_wrong for one in self.unusable)
        neither = n - both - only_first - only_second
        return Comparison(
            first=first.setting.name,
            second=second.setting.name,
            n=n,
            both=both,
            only_first=only_first,
            only_second=only_second,
            neither=neither,
            difference=(only_first - only_second) / n,
            ci95=paired_difference_interval(both, only_first, only_second, neither),
            mcnemar_p=mcnemar(only_first, only_second),
        )

    def gallery(
        self, settings: Sequence[Answered], *, compact: Answered, gap: Answered
    ) -> tuple[GalleryItem, ...]:
        """Questions that one setting with GAP did best and worst, and that GAP alone got right.

        At most one for each image and kind, and each question once. It holds the answers of all
        settings, and is chosen by a pair with compact positions and with GAP.
        """
        places = range(len(self.questions))
        asked = [place for place in places if gap.records[place].error is None]
        by_iou = sorted(asked, key=lambda place: gap.scores[place].iou)
        flipped = [
            place for place in asked if gap.scores[place].hit and not compact.scores[place].hit
        ]
        ranked: dict[GalleryKind, Sequence[int]] = {
            "flipped by GAP": flipped,
            "best": [place for place in reversed(by_iou) if gap.scores[place].hit],
            "worst": [place for place in by_iou if not gap.scores[place].hit],
        }
        chosen: dict[int, GalleryKind] = {}
        for kind, candidates in ranked.items():
            images: set[str] = set()
            for place in candidates:
                image = self.questions[place].image_id
                if len(images) < GALLERY_SIZE and place not in chosen and image not in images:
                    chosen[place] = kind
                    images.add(image)
        return tuple(
            _gallery_item(kind, self.questions[place], place, settings)
            for kind in ("best", "worst", "flipped by GAP")
            for place, of_kind in chosen.items()
            if of_kind == kind
        )

    def _accuracy(self, scores: Sequence[Score]) -> Accuracy:
        hits = np.array([score.hit for score in scores], dtype=np.float64)
        ious = [score.iou for score in scores]
        images = [score.image_id for score in scores]
        return Accuracy(
            n=len(scores),
            num_images=len(set(images)),
            acc_at_50=float(hits.mean()),
            ci95=_interval(hits, images, self.seed),
            mean_iou=_mean(ious),
            parse_failures=sum(score.was_asked and not score.parsed for score in scores),
            curve={
                f"{threshold:g}": _mean(self.protocol.is_hit(iou, threshold) for iou in ious)
                for threshold in _THRESHOLDS
            },
        )

    def _by(
        self, scores: Sequence[Score], key: Callable[[Score], str | None]
    ) -> dict[str, Accuracy]:
        """Accuracy by what a key gives, in the order met; without those that have none."""
        parts: dict[str, list[Score]] = {}
        for score in scores:
            name = key(score)
            if name is not None:
                parts.setdefault(name, []).append(score)
        return {name: self._accuracy(part) for name, part in parts.items()}


def _gallery_item(
    kind: GalleryKind, question: Question, place: int, settings: Sequence[Answered]
) -> GalleryItem:
    return GalleryItem(
        kind=kind,
        question_id=question.id,
        expression=question.expression,
        image=question.image,
        box=question.box,
        answers=tuple(
            GalleryAnswer(
                setting=one.setting.name,
                text=one.records[place].text,
                box=one.records[place].box,
                iou=one.scores[place].iou,
            )
            for one in settings
        ),
    )


def _latency(
    questions: Sequence[Question], records: Sequence[Record]
) -> tuple[dict[str, dict[str, float]], float]:
    """Milliseconds by stage, and how many were asked together; a batch counts once."""
    # Answers of one batch stand together and share their times.
    pairs = [pair for pair in zip(questions, records, strict=True) if pair[1].error is None]
    batches = [
        next(group)[1]
        for _, group in groupby(
            pairs, key=lambda pair: (pair[0].image_id, tuple(pair[1].timings_ms.items()))
        )
    ]
    latency = {}
    for stage in dict.fromkeys(stage for record in batches for stage in record.timings_ms):
        times = [record.timings_ms[stage] for record in batches if stage in record.timings_ms]
        latency[stage] = {
            "median": round(float(np.median(times)), 3),
            "p95": round(float(np.percentile(times, 95)), 3),
        }
    return latency, len(pairs) / len(batches) if batches else 0.0


def _interval(hits: NDArray[np.float64], images: Sequence[str], seed: int) -> Interval:
    """95 %, images drawn; where that has no width, as of one image, Wilson's.

    That takes each image for one question, so it is rather too wide than too narrow.
    """
    low, high = bootstrap_interval(hits, images, seed=seed)
    if low < high:
        return low, high
    share, num_images = float(hits.mean()), len(set(images))
    low, high = wilson_interval(round(share * num_images), num_images)
    # Of three images not one and a half can be right.
    return min(low, share), max(high, share)


def _mean(values: Iterable[float]) -> float:
    """Their mean; 0 of none."""
    found = list(values)
    return sum(found) / len(found) if found else 0.0
