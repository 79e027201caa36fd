"""What the reports for people have in common: words, numbers, and tables of text.

All text is plain here; each format escapes it in its own way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from gap_export.evaluation.results import Accuracy, EvaluationReport, Interval, SettingRow
from gap_export.report.parity.words import Table
from gap_export.visible import clean

SectionName = Literal[
    "accuracy", "comparisons", "thresholds", "kinds", "splits", "latency", "gallery", "unusable"
]
GALLERY_TITLES: Mapping[str, str] = MappingProxyType(
    {
        "flipped by GAP": "right with GAP, wrong with compact positions",
        "best": "where GAP did best",
        "worst": "where GAP did worst",
    }
)
_TOTAL = "total"
_FRAMES = {
    "raw": "boxes of images as stored",
    "upright": "boxes of images as displayed, turned as EXIF says",
}
_INTERVALS = (
    "95 %. Of an accuracy: percentile bootstrap over pictures, since expressions about one picture "
    "are not independent; where that has no width Wilson's, each picture taken for one question. "
    "Of a difference: Newcombe 1998, method 10, of the same expressions"
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the report.

    Attributes:
        name: Which.
        title: In words.
        tables: At least one.
    """

    name: SectionName
    title: str
    tables: tuple[Table, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Settings that are shown side by side: the unpruned one and what was made of it.

    Attributes:
        title: What they have in common: pruner and keep ratio, or that nothing is dropped.
        rows: The unpruned one first, where there is one.
    """

    title: str
    rows: tuple[SettingRow, ...]

    def row(self, positions: str) -> SettingRow | None:
        """The one with these positions."""
        return next((row for row in self.rows if row.positions == positions), None)


def page_title(report: EvaluationReport) -> str:
    """Model and data."""
    return f"gap-export eval: {clean(report.model)} on {clean(report.data.name)}"


def headline(report: EvaluationReport) -> str:
    """The accuracies, in a line."""
    parts = []
    for positions, name in (
        ("none", "unpruned"),
        ("gap", "GAP"),
        ("compact", "compact positions"),
        ("permuted", "permuted"),
        ("shifted", "shifted"),
    ):
        shares = sorted(row.acc_at_50 for row in report.rows if row.positions == positions)
        if shares:
            low, high = percent(shares[0]), percent(shares[-1])
            parts.append(f"{name} {low if low == high else f'{low} to {high}'}")
    recovered = report.worst_recovery()
    if recovered is not None:
        parts.append(f"GAP recovers at least {percent(recovered)} of unpruned")
    return f"Acc@0.5: {'; '.join(parts)}."


def facts(report: EvaluationReport) -> tuple[tuple[str, str], ...]:
    """What was measured and how, by name."""
    data = report.data
    splits = ", ".join(map(clean, data.splits))
    backends = dict.fromkeys(clean(row.backend) for row in report.rows if row.backend)
    counted = report.rows[0]
    return (
        ("model", f"{clean(report.model)}, of the family {clean(report.family)}"),
        ("data", f"{clean(data.name)}, split {splits}"),
        ("read from", f"{clean(data.spec)} (layout: {clean(data.layout)})"),
        ("expressions", f"{counted.n} about {counted.num_images} pictures"),
        ("frame", describe_frame(report)),
        ("could not be asked", _describe_unusable(report)),
        ("protocol", f"{clean(report.protocol)}: {clean(report.protocol_summary)}"),
        ("prompt", clean(report.prompt)),
        ("decoding", "greedy"),
        ("seed", str(report.seed)),
        ("backend", "; ".join(backends) or clean(report.backend)),
        ("intervals", _INTERVALS),
    )


def describe_frame(report: EvaluationReport) -> str:
    """What boxes are coordinates of, and how many images that makes a difference for."""
    data = report.data
    images = "image carries" if data.num_turned == 1 else "images carry"
    return f"{clean(data.frame)} ({_FRAMES.get(data.frame, 'both are declared')}); " + (
        f"{data.num_turned} {images} an EXIF orientation"
    )


def _describe_unusable(report: EvaluationReport) -> str:
    data = report.data
    if not data.unusable:
        return "none of the data set's expressions"
    return (
        f"{len(data.unusable)} of the data set's {data.num_expressions} expressions. Counted as "
        f"wrong: {len(data.unusable) - data.num_excluded}. Left out, since by their annotation no "
        f"answer could be right: {data.num_excluded}"
    )


def sections(report: EvaluationReport) -> tuple[Section, ...]:
    """The parts that have something to say, in order."""
    rows = report.rows
    made: tuple[tuple[SectionName, str, tuple[Table, ...]], ...] = (
        ("accuracy", "Accuracy", (_accuracy(report), _protocols(rows))),
        ("comparisons", "Paired comparisons", (_comparisons(report),)),
        ("thresholds", "Accuracy by threshold of IoU", (_thresholds(rows),)),
        ("kinds", "Accuracy by kind of expression", (_groups(rows, "kind", by_kind),)),
        ("splits", "Accuracy by split", (_groups(rows, "split", by_split),)),
        ("latency", "Latency", (_latency(rows),)),
        ("gallery", "Gallery", (_gallery(report),)),
        ("unusable", "What could not be asked", (_reasons(report), _unusable(report))),
    )
    found = []
    for name, title, tables in made:
        filled = tuple(table for table in tables if table.rows)
        if filled:
            found.append(Section(name=name, title=title, tables=filled))
    return tuple(found)


def by_kind(row: SettingRow) -> Mapping[str, Accuracy]:
    """Its accuracy by kind of expression."""
    return row.by_kind


def by_split(row: SettingRow) -> Mapping[str, Accuracy]:
    """Its accuracy by split, where there are several."""
    return row.by_split if len(row.by_split) > 1 else {}


def panels(rows: Sequence[SettingRow]) -> tuple[Panel, ...]:
    """Settings with the unpruned one: each pruner at each keep ratio, then what drops nothing."""
    unpruned = [row for row in rows if row.positions == "none"]
    groups: dict[str, list[SettingRow]] = {}
    for row in rows:
        if row.positions in ("compact", "gap"):
            groups.setdefault(configuration(row), []).append(row)
    misaligned = [row for row in rows if row.positions in ("permuted", "shifted")]
    if misaligned:
        groups["no token dropped"] = misaligned
    if not groups:
        groups["unpruned"] = []
    return tuple(
        Panel(title=title, rows=(*unpruned, *members)) for title, members in groups.items()
    )


def configuration(row: SettingRow) -> str:
    """Pruner, keep ratio and, of a pruner that reads it, the question."""
    reads = " (reads the question)" if row.pruner_text == "question" else ""
    return f"{clean(row.pruner)} keep {row.keep_ratio:g}{reads}"


def names_of(tables: Iterable[Mapping[str, object]]) -> tuple[str, ...]:
    """Keys of all of them, each once, in the order they come in."""
    return tuple(dict.fromkeys(name for table in tables for name in table))


def stages_of(rows: Sequence[SettingRow]) -> tuple[str, ...]:
    """Stages that were timed, the total last."""
    names = names_of(row.latency_ms for row in rows)
    return tuple(sorted(names, key=lambda name: name == _TOTAL))


def percent(share: float) -> str:
    """A share in percent, to a tenth."""
    return f"{100 * share:.1f} %"


def p_value(value: float) -> str:
    """Two digits; below what can be told from 0, that."""
    if value >= 0.001:
        return f"{value:.3f}"
    return f"{value:.1e}" if value > 0 else "< 1e-300"


def _interval(interval: Interval, *, signed: bool = False) -> str:
    low, high = (100 * end for end in interval)
    return f"{low:+.1f} to {high:+.1f}" if signed else f"{low:.1f} to {high:.1f}"


def _accuracy(report: EvaluationReport) -> Table:
    rows = report.rows
    lacking = any(row.num_unusable for row in rows)
    header = (
        *("setting", "Acc@0.5", "95 % interval", "of unpruned", "mean IoU", "without a box"),
        *("read with tolerance", "out of scale", "cut off"),
        *("visual tokens", "expressions", "pictures"),
        *(("not asked", "Acc@0.5 without those") if lacking else ()),
    )
    cells = []
    for row in rows:
        without = "" if row.acc_at_50_usable is None else percent(row.acc_at_50_usable)
        cells.append(
            (
                clean(row.name),
                percent(row.acc_at_50),
                _interval(row.ci95),
                "" if row.recovered is None else percent(row.recovered),
                f"{row.mean_iou:.3f}",
                str(row.parse_failures),
                str(row.num_tolerant),
                str(row.num_out_of_scale),
                str(row.num_cut_off),
                f"{row.mean_visual_tokens:.1f}",
                str(row.n),
                str(row.num_images),
                *((str(row.num_unusable), without) if lacking else ()),
            )
        )
    notes = [f"{clean(name)}: {clean(text)}" for name, text in report.misalignments.items()]
    if any(row.num_tolerant for row in rows):
        notes.append("Read with tolerance: a box that is not written as the model should write it.")
    if any(row.num_out_of_scale for row in rows):
        notes.append("Out of scale: what of the box is within the picture is judged.")
    if lacking:
        notes.append(
            "Not asked, or not to be judged: the picture is missing, broken or of another size "
            "than annotated, or the model refuses the text."
        )
    return Table(
        title=f"Acc@0.5 by the protocol {clean(report.protocol)}",
        header=header,
        rows=tuple(cells),
        notes=tuple(notes),
    )


def _protocols(rows: Sequence[SettingRow]) -> Table:
    names = names_of(row.other_protocols for row in rows)
    return Table(
        title="Acc@0.5 of the same answers by other protocols",
        header=("setting", *map(clean, names)),
        rows=tuple(
            (clean(row.name), *(_share(row.other_protocols.get(name)) for name in names))
            for row in rows
            if names
        ),
        notes=(
            "For comparison with figures of others; not to be mixed with the ones above. What a "
            "protocol does not read is wrong under it: Shikra's reads no box with spaces in it.",
        ),
    )


def _comparisons(report: EvaluationReport) -> Table:
    return Table(
        title="two settings over the same expressions, counted at Acc@0.5",
        header=(
            *("first", "second", "both right", "first alone", "second alone", "none"),
            *("difference in points", "95 % interval", "McNemar p"),
        ),
        rows=tuple(
            (
                clean(pair.first),
                clean(pair.second),
                *map(str, (pair.both, pair.only_first, pair.only_second, pair.neither)),
                f"{100 * pair.difference:+.1f}",
                _interval(pair.ci95, signed=True),
                p_value(pair.mcnemar_p),
            )
            for pair in report.comparisons
        ),
        notes=(
            "p: exact, two-sided, not corrected for the number of comparisons. Expressions about "
            "one picture are treated as independent here, so it is a little small.",
        ),
    )


def _thresholds(rows: Sequence[SettingRow]) -> Table:
    names = names_of(row.curve for row in rows)
    return Table(
        title="share of expressions that hit, by the threshold of IoU",
        header=("setting", *(f"Acc@{clean(name)}" for name in names)),
        rows=tuple(
            (clean(row.name), *(_share(row.curve.get(name)) for name in names))
            for row in rows
            if names
        ),
    )


def _groups(
    rows: Sequence[SettingRow], what: str, groups_of: Callable[[SettingRow], Mapping[str, Accuracy]]
) -> Table:
    """A column for each group, how many expressions it has in its header."""
    found = [groups_of(row) for row in rows]
    names = names_of(found)
    sizes = {name: group.n for groups in found for name, group in groups.items()}
    cells = []
    for row, groups in zip(rows, found, strict=True):
        if groups:
            shown = (_with_interval(groups.get(name)) for name in names)
            cells.append((clean(row.name), *shown))
    return Table(
        title=f"Acc@0.5 and its 95 % interval by {what}; in brackets the number of expressions",
        header=("setting", *(f"{clean(name)} ({sizes[name]})" for name in names)),
        rows=tuple(cells),
    )


def _latency(rows: Sequence[SettingRow]) -> Table:
    stages = stages_of(rows)
    several = len({row.backend for row in rows}) > 1
    cells = []
    for row in rows:
        if row.latency_ms:
            times = (_times(row.latency_ms.get(stage)) for stage in stages)
            ran = (clean(row.backend),) if several else ()
            cells.append((clean(row.name), *ran, f"{row.mean_batch_size:.1f}", *times))
    return Table(
        title="milliseconds by stage: median / 95th percentile",
        header=(
            *("setting", *(("backend",) if several else ()), "expressions a batch"),
            *map(clean, stages),
        ),
        rows=tuple(cells),
        notes=(
            "Of a batch: expressions about one picture that are asked together. Measured while the "
            "evaluation ran, beside whatever else ran; compare settings by it, not machines.",
        ),
    )


def _gallery(report: EvaluationReport) -> Table:
    """What the page has pictures of; empty where the settings are not the rows'."""
    names = [row.name for row in report.rows]
    cells = []
    for item in report.gallery:
        ious = {answer.setting: f"{answer.iou:.2f}" for answer in item.answers}
        cells.append(
            (
                GALLERY_TITLES[item.kind],
                clean(item.question_id),
                clean(item.expression),
                *(ious.get(name, "") for name in names),
            )
        )
    return Table(
        title="IoU of some answers; chosen by the first setting with GAP",
        header=("why", "question", "expression", *map(clean, names)),
        rows=tuple(cells),
    )


def _reasons(report: EvaluationReport) -> Table:
    counts = Counter((one.reason, one.counts_as_wrong) for one in report.data.unusable)
    return Table(
        title="expressions by reason",
        header=("reason", "expressions", "in the accuracy"),
        rows=tuple(
            (reason, str(count), "counted as wrong" if wrong else "left out")
            for (reason, wrong), count in counts.most_common()
        ),
    )


def _unusable(report: EvaluationReport) -> Table:
    return Table(
        title="each of them",
        header=("question", "split", "reason", "seen"),
        rows=tuple(
            (clean(one.question_id), clean(one.split), one.reason, clean(one.detail))
            for one in report.data.unusable
        ),
    )


def _share(share: float | None) -> str:
    return "" if share is None else percent(share)


def _with_interval(group: Accuracy | None) -> str:
    return "" if group is None else f"{percent(group.acc_at_50)} ({_interval(group.ci95)})"


def _times(times: Mapping[str, float] | None) -> str:
    return "" if times is None else f"{times['median']:.1f} / {times['p95']:.1f}"
