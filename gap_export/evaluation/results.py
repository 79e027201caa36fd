"""What an evaluation found, as plain data that reports are written from.

Shares are 0..1, boxes are (x1, y1, x2, y2) in pixels of the image, times are milliseconds. The
names of the fields are the keys of the JSON form.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from gap_export.evaluation.absence import Absence
from gap_export.evaluation.questions import ImageSource, Unusable
from gap_export.evaluation.settings import SettingPositions
from gap_export.parity.results import plain_values
from gap_export.spec.manifest import PrunerText
from gap_export.version import __version__

SCHEMA = "gap-export-evaluation"
SCHEMA_VERSION = 1

Interval = tuple[float, float]
Box = tuple[float, float, float, float]
GalleryKind = Literal["best", "worst", "flipped by GAP"]


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """How well some expressions were answered.

    Attributes:
        n: Expressions, including those that could not be asked because their image is missing.
        num_images: Images they are about.
        acc_at_50: Share of the n that are right, by the IoU of the protocol at 0.5.
        ci95: 95 % interval of it: bootstrap over images; where that has no width Wilson's, each
            image taken for one question.
        mean_iou: Over the n; an answer without a box has IoU 0.
        parse_failures: Answers in which the protocol reads no box.
        curve: Share of hits by threshold, ``"0.1"`` to ``"0.9"``.
    """

    n: int
    num_images: int
    acc_at_50: float
    ci95: Interval
    mean_iou: float
    parse_failures: int
    curve: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SettingRow(Accuracy):
    """One measured setting; its accuracy is over all expressions.

    Attributes:
        name: Name of the setting, unique in a report.
        pruner: Its name, or ``none`` where nothing is dropped.
        keep_ratio: 1.0 where nothing is dropped.
        positions: ``none`` (nothing is dropped), ``compact``, ``gap``, on three axes
            ``text-shifted``, or with nothing dropped ``permuted`` or ``shifted``, or
            ``smaller-image``: the model unpruned, shown fewer pixels.
        seed: Seed of the samples, of pruners that draw, and of random orders.
        protocol: By which answers were judged.
        pruner_text: What the pruner reads of the text, ``expression`` or ``question``; None where
            it reads none.
        recovered: acc_at_50 divided by the unpruned row's; None for that row itself, or if it is 0.
        mean_visual_tokens: Mean number of visual tokens the decoder read of an image, an extra one
            included.
        num_unusable: Expressions of the n that could not be asked, and so count as wrong: their
            image is missing or broken, or the model refuses them.
        acc_at_50_usable: acc_at_50 of the expressions that could be asked; None where none could.
        num_tolerant: Answers with a box that is not written in the model's syntax and was read with
            tolerance.
        num_out_of_scale: Answers whose box is written on another scale than the model's.
        num_cut_off: Answers that were cut off at the model's ``max_new_tokens``.
        by_kind: Accuracy by kind of expression; empty where the data has none.
        latency_ms: By stage its ``median`` and ``p95``, of one batch: expressions about one image
            that are asked together.
        mean_batch_size: Expressions in such a batch.
        other_protocols: acc_at_50 of the same answers by the other protocols.
        backend: What ran the model, with its version and device.
        multiply_adds: Of matrix products and convolutions until an answer begins, by stage
            (``vision``, ``prefill``), of one expression at the mean length of prompts; empty where
            no smaller image is measured.
        absence: How well the score tells what is there; None where nothing that is not was asked
            for, or no answer has a box.
    """

    name: str
    model: str
    pruner: str
    keep_ratio: float
    positions: SettingPositions
    seed: int
    protocol: str
    recovered: float | None
    mean_visual_tokens: float
    num_unusable: int = 0
    acc_at_50_usable: float | None = None
    num_tolerant: int = 0
    num_out_of_scale: int = 0
    num_cut_off: int = 0
    by_split: Mapping[str, Accuracy] = field(default_factory=dict)
    by_kind: Mapping[str, Accuracy] = field(default_factory=dict)
    latency_ms: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    mean_batch_size: float = 1.0
    other_protocols: Mapping[str, float] = field(default_factory=dict)
    backend: str = ""
    pruner_text: PrunerText | None = None
    multiply_adds: Mapping[str, int] = field(default_factory=dict)
    absence: Absence | None = None

    def to_plain(self) -> dict[str, Any]:
        """JSON form; what it is comes first, then what was measured."""
        plain: dict[str, Any] = plain_values(asdict(self))
        measured = {one.name for one in fields(Accuracy)}
        # Up to the protocol a row says what it is.
        what = [name for name in plain if name not in measured]
        what = what[: what.index("protocol") + 1]
        return {**{name: plain[name] for name in what}, **plain}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two settings over the same expressions.

    Attributes:
        n: Expressions, of which ``both`` hit, one of them only, or ``neither``.
        difference: acc_at_50 of the first minus that of the second.
        ci95: 95 % interval of it (Newcombe 1998, method 10).
        mcnemar_p: Exact two-sided p-value of McNemar's test.
    """

    first: str
    second: str
    n: int
    both: int
    only_first: int
    only_second: int
    neither: int
    difference: float
    ci95: Interval
    mcnemar_p: float


@dataclass(frozen=True, kw_only=True)
class DataSummary:
    """What was asked.

    Attributes:
        spec: As the user named it.
        layout: How it is stored.
        num_expressions: All there are, unusable ones included.
        num_images: Images of those that could be asked about.
        frame: What boxes are coordinates of: ``raw``: images as stored, ``upright``: as displayed.
        num_turned: Images that carry an EXIF orientation other than 1.
        num_excluded: Expressions whose annotation is at fault: no answer could be right, so they
            are left out of every accuracy.
        unusable: What could not be asked, and why.
        fingerprint: SHA-256, hex, of ids, expressions and boxes.
        num_absent: Expressions whose object is not there, which are part of no accuracy.
    """

    spec: str
    name: str
    layout: str
    splits: tuple[str, ...]
    num_expressions: int
    num_images: int
    frame: str = "upright"
    num_turned: int = 0
    num_excluded: int = 0
    unusable: tuple[Unusable, ...] = ()
    fingerprint: str = ""
    num_absent: int = 0


@dataclass(frozen=True, kw_only=True)
class GalleryAnswer:
    """What one setting answered.

    Attributes:
        box: None where the answer has none.
        iou: By the report's protocol.
    """

    setting: str
    text: str
    box: Box | None
    iou: float


@dataclass(frozen=True, kw_only=True)
class GalleryItem:
    """A question worth looking at.

    Attributes:
        kind: Why: where GAP did best, worst, or was right and compact positions were wrong.
        image: The image; no part of the JSON form.
        box: The right answer.
        answers: One for each setting, in the order of the rows.
    """

    kind: GalleryKind
    question_id: str
    expression: str
    image: ImageSource
    box: Box
    answers: tuple[GalleryAnswer, ...]

    def to_plain(self) -> dict[str, Any]:
        """JSON form, without the image."""
        plain: dict[str, Any] = plain_values(asdict(self))
        del plain["image"]
        return plain


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """The rows, unpruned first, and all that is needed to understand them.

    Attributes:
        model: Recipe name.
        prompt: The template that was used.
        seed: Seed of the samples, of pruners that draw, and of random orders.
        backend: ``onnxruntime``, ``tensorrt`` or ``openvino``; see also each row's.
        misalignments: What was done to positions, in words: where no token is dropped by the name
            of the setting, else by what its ``positions`` are called.
        warnings: What makes the measurement doubtful, in words: most answers of the unpruned model
            are on another scale, or none is right.
        rows: One for each setting.
    """

    model: str
    family: str
    data: DataSummary
    protocol: str
    protocol_summary: str
    prompt: str
    seed: int
    backend: str
    misalignments: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    rows: tuple[SettingRow, ...]
    comparisons: tuple[Comparison, ...] = ()
    gallery: tuple[GalleryItem, ...] = ()

    def to_plain(self) -> dict[str, Any]:
        """JSON form; images are no part of it."""
        return {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "gap_export_version": __version__,
            **plain_values(asdict(self)),
            "rows": [row.to_plain() for row in self.rows],
            "gallery": [item.to_plain() for item in self.gallery],
        }

    def gap_rows(self) -> list[SettingRow]:
        """The rows of pruned bundles as they are: with GAP, and their own attention."""
        own = {(r.pruner, r.keep_ratio): r for r in self.rows if r.positions == "gap"}
        own |= {(r.pruner, r.keep_ratio): r for r in self.rows if r.positions == "gap+proportional"}
        return list(own.values())

    def worst_recovery(self) -> float | None:
        """Smallest share of the unpruned accuracy that GAP recovered, over the GAP rows."""
        shares = [row.recovered for row in self.gap_rows() if row.recovered is not None]
        return min(shares, default=None)
