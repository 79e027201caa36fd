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
from gap_export.evaluation.scoring import Score, score_records
from gap_export.evaluation.settings import Setting
from gap_export.evaluation.statistics import accuracy_curve, bootstrap_interval, mcnemar
from gap_export.parity.metrics import paired_difference_interval, wilson_interval
from gap_export.spec.manifest import BoxSpec

GALLERY_SIZE = 8


@dataclass(frozen=True, kw_only=True)
class Answered:
    """One setting with its answers, judged.

    Attributes:
        setting: What was asked.
        records: One for each question, in the questions' order.
        scores: Of them, likewise.
    """

    setting: Setting
    records: tuple[Record, ...]
    scores: tuple[Score, ...]


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What all settings of an evaluation share.

    Attributes:
        questions: What was asked; those of one image stand together.
        unusable: What could not be asked.
        protocol: By which answers are judged.
        box_spec: How the model writes boxes.
        model: Recipe name.
        seed: Of the evaluation; also of the bootstrap.
    """

    questions: Sequence[Question]
    unusable: Sequence[Unusable]
    protocol: Protocol
    box_spec: BoxSpec
    model: str
    seed: int

    def judge(self, setting: Setting, records: Mapping[str, Record]) -> Answered:
        """Score the answers of one setting.

        Args:
            setting: Of them.
            records: One for each question, by its id.
        """
        ordered = tuple(records[question.id] for question in self.questions)
        return Answered(
            setting=setting,
            records=ordered,
            scores=tuple(score_records(ordered, self.questions, self.protocol, self.box_spec)),
        )

    def row(self, answered: Answered, unpruned: float | None) -> SettingRow:
        """One row of the report.

        Args:
            answered: The setting.
            unpruned: acc_at_50 of the unpruned row; None for that row itself.
        """
        entries = self._entries(answered)
        all_of_them = self._accuracy(entries)
        usable = [entry for entry in entries if entry.was_asked]
        given = [record for record in answered.records if record.error is None]
        latency, batch_size = _latency(self.questions, answered.records)
        setting = answered.setting
        return SettingRow(
            **vars(all_of_them),
            name=setting.name,
            model=self.model,
            pruner=setting.pruner,
            keep_ratio=setting.keep_ratio,
            pruner_text=setting.pruner_text,
            positions=setting.positions,
            seed=self.seed,
            protocol=self.protocol.name,
            recovered=all_of_them.acc_at_50 / unpruned if unpruned else None,
            mean_visual_tokens=_mean(record.num_kept_tokens for record in given),
            num_unusable=len(entries) - len(usable),
            acc_at_50_usable=_mean(entry.hit for entry in usable) if usable else None,
            num_tolerant=sum(score.parsed and not score.exact for score in answered.scores),
            num_out_of_scale=sum(is_record_out_of_scale(one, self.box_spec) for one in given),
            num_cut_off=sum(record.cut_off for record in given),
            by_split=self._by(entries, lambda entry: entry.split),
            by_kind=self._by(entries, lambda entry: entry.kind),
            latency_ms=latency,
            mean_batch_size=batch_size,
            other_protocols=self._other_protocols(answered, len(entries)),
            backend="; ".join(dict.fromkeys(record.backend for record in given)),
        )

    def compare(self, first: Answered, second: Answered) -> Comparison:
        """Two settings over the same expressions."""
        hits = [
            (one.hit, other.hit) for one, other in zip(first.scores, second.scores, strict=True)
        ]
        both, only_first = hits.count((True, True)), hits.count((True, False))
        only_second = hits.count((False, True))
        # What could not be asked was answered rightly by neither.
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

        At most one an image and kind, and each question once.

        Args:
            settings: All of the report.
            compact: With compact positions.
            gap: The same with GAP.
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
        taken: set[int] = set()
        items: dict[GalleryKind, list[GalleryItem]] = {}
        for kind, candidates in ranked.items():
            images: set[str] = set()
            chosen = items.setdefault(kind, [])
            for place in candidates:
                image = self.questions[place].image_id
                if len(chosen) < GALLERY_SIZE and place not in taken and image not in images:
                    taken.add(place)
                    images.add(image)
                    chosen.append(_gallery_item(kind, self.questions[place], place, settings))
        return (*items["best"], *items["worst"], *items["flipped by GAP"])

    def _entries(self, answered: Answered) -> list[_Entry]:
        """All that counts, with what could not be asked as wrong."""
        asked = [
            _Entry(
                image_id=question.image_id,
                split=question.split,
                kind=question.kind,
                iou=score.iou,
                hit=score.hit,
                is_parsed=score.parsed,
                was_asked=record.error is None,
            )
            for question, record, score in zip(
                self.questions, answered.records, answered.scores, strict=True
            )
        ]
        not_asked = [
            _Entry(
                image_id=one.image_id,
                split=one.split,
                kind=one.kind,
                iou=0.0,
                hit=False,
                is_parsed=False,
                was_asked=False,
            )
            for one in self.unusable
            if one.counts_as_wrong
        ]
        return asked + not_asked

    def _accuracy(self, entries: Sequence[_Entry]) -> Accuracy:
        hits = np.array([entry.hit for entry in entries], dtype=np.float64)
        ious = [entry.iou for entry in entries]
        images = [entry.image_id for entry in entries]
        return Accuracy(
            n=len(entries),
            num_images=len(set(images)),
            acc_at_50=float(hits.mean()),
            ci95=_interval(hits, images, self.seed),
            mean_iou=_mean(ious),
            parse_failures=sum(entry.was_asked and not entry.is_parsed for entry in entries),
            curve=accuracy_curve(ious, self.protocol),
        )

    def _by(
        self, entries: Sequence[_Entry], key: Callable[[_Entry], str | None]
    ) -> dict[str, Accuracy]:
        """Accuracy by what a key gives, in the order met; without those that have none."""
        parts: dict[str, list[_Entry]] = {}
        for entry in entries:
            name = key(entry)
            if name is not None:
                parts.setdefault(name, []).append(entry)
        return {name: self._accuracy(part) for name, part in parts.items()}

    def _other_protocols(self, answered: Answered, n: int) -> dict[str, float]:
        return {
            protocol.name: sum(
                score.hit
                for score in score_records(
                    answered.records, self.questions, protocol, self.box_spec
                )
            )
            / n
            for protocol in applicable(self.box_spec)
            if protocol.name != self.protocol.name
        }


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """One expression of the denominator."""

    image_id: str
    split: str
    kind: str | None
    iou: float
    hit: bool
    is_parsed: bool
    was_asked: bool


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
