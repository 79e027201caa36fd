"""An evaluation as a document: its words and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import TypeVar

from gap_export.evaluation.results import (
    SCHEMA_VERSION,
    Accuracy,
    EvaluationReport,
    GalleryItem,
    Interval,
    SettingRow,
)
from gap_export.report.absence import tabulate_absence
from gap_export.report.document import Document, Figure, Section, Table, Tile
from gap_export.report.figures.accuracies import (
    draw_accuracies,
    draw_groups,
    draw_latencies,
    draw_thresholds,
    draw_tokens,
)
from gap_export.report.gallery import TITLES, gallery_shelves
from gap_export.report.panels import BEGINNING, SMALLER_IMAGE, Panel, names_of, panels_of, stages_of
from gap_export.visible import clean, visible_strings

_Value = TypeVar("_Value")
_FRAMES = {
    "raw": "boxes of images as stored",
    "upright": "boxes of images as displayed, turned as EXIF says",
}
_INTERVALS = (
    "95 %. Accuracy: percentile bootstrap over images, since expressions about one image "
    "are not independent; where that has no width Wilson's, each image taken for one question. "
    "Difference: Newcombe 1998, method 10, of the same expressions"
)


def document_of_evaluation(report: EvaluationReport) -> Document:
    """What an evaluation measured, for people."""
    report = visible_strings(report, show=clean)
    tiles = _tiles(report)
    lead = "; ".join(f"{tile.label} {tile.value}" for tile in tiles)
    panels = panels_of(report.rows)
    made = (
        _accuracy(report, lead),
        Section(title="Objects that are not there", tables=(tabulate_absence(report.rows),)),
        Section(title="Paired comparisons", tables=(_comparisons(report),)),
        Section(
            title="Accuracy by threshold of IoU",
            tables=(
                _spread(
                    "share of expressions that hit, by the threshold of IoU",
                    report.rows,
                    lambda row: {f"Acc@{name}": share for name, share in row.curve.items()},
                    percent,
                ),
            ),
            figures=(
                Figure(
                    caption="The share of hits falls as the threshold of IoU rises; the numbers "
                    "are in the table.",
                    draw=partial(draw_thresholds, panels),
                ),
            ),
        ),
        _groups("kind", "kind of expression", lambda row: row.by_kind, report.rows, panels),
        # A split alone is the data set, of which all is said already.
        _groups(
            "split",
            "split",
            lambda row: row.by_split if len(row.by_split) > 1 else {},
            report.rows,
            panels,
        ),
        _latency(report.rows),
        Section(title="Until the answer begins", tables=(_costs(report.rows),)),
        Section(
            title="Gallery", tables=(_gallery(report),), gallery=partial(gallery_shelves, report)
        ),
        Section(title="What could not be asked", tables=_unusable(report)),
    )
    return Document(
        command="eval",
        title=f"{report.model} on {report.data.name}",
        lead=f"Acc@0.5: {lead}.",
        tiles=tiles,
        problems_title="Warnings",
        problems=report.warnings,
        facts=_facts(report),
        sections=tuple(one for one in made if any(table.rows for table in one.tables)),
        schema_version=SCHEMA_VERSION,
    )


def percent(share: float | None) -> str:
    """A share in percent, to a tenth; empty where there is none."""
    return "" if share is None else f"{100 * share:.1f} %"


def p_value(value: float) -> str:
    """A p-value in few digits, or its bound where it is too small for a float."""
    if value >= 0.001:
        return f"{value:.3f}"
    return f"{value:.1e}" if value > 0 else "< 1e-300"


def describe_frame(report: EvaluationReport) -> str:
    """What boxes are coordinates of, and how many images that makes a difference for."""
    data = report.data
    images = "image carries" if data.num_turned == 1 else "images carry"
    return f"{data.frame} ({_FRAMES.get(data.frame, 'both are declared')}); " + (
        f"{data.num_turned} {images} an EXIF orientation"
    )


def _tiles(report: EvaluationReport) -> tuple[Tile, ...]:
    """Acc@0.5 by what was done to the positions, over all pruners and keep ratios."""
    tiles = []
    for positions, pruned, name in (
        ("none", False, "unpruned"),
        ("gap", True, "GAP"),
        ("gap+proportional", True, "GAP, proportional attention"),
        ("compact", True, "compact positions"),
        ("text-shifted", True, "text-shifted"),
        (SMALLER_IMAGE, False, "smaller image"),
        ("compact", False, "compact, no token dropped"),
        ("permuted", False, "permuted"),
        ("shifted", False, "shifted"),
    ):
        shares = sorted(
            row.acc_at_50
            for row in report.rows
            if row.positions == positions and (row.pruner != "none") == pruned
        )
        if shares:
            low, high = f"{100 * shares[0]:.1f}", f"{100 * shares[-1]:.1f}"
            tiles.append(Tile(label=name, value=f"{low if low == high else f'{low}-{high}'} %"))
    recovered = report.worst_recovery()
    if recovered is not None:
        tiles.append(Tile(label="GAP recovers at least", value=f"{percent(recovered)} of unpruned"))
    return tuple(tiles)


def _facts(report: EvaluationReport) -> tuple[tuple[str, str], ...]:
    data, counted = report.data, report.rows[0]
    backends = dict.fromkeys(row.backend for row in report.rows if row.backend)
    unusable = "none of the data set's expressions"
    if data.unusable:
        unusable = (
            f"{len(data.unusable)} of the data set's {data.num_expressions} expressions. Counted "
            f"as wrong: {len(data.unusable) - data.num_excluded}. Left out, since by their "
            f"annotation no answer could be right: {data.num_excluded}"
        )
    return (
        ("model", f"{report.model}, of the family {report.family}"),
        ("data", f"{data.name}, split {', '.join(data.splits)}"),
        ("read from", f"{data.spec} (layout: {data.layout})"),
        ("expressions", f"{counted.n} about {counted.num_images} images"),
        ("frame", describe_frame(report)),
        ("could not be asked", unusable),
        ("protocol", f"{report.protocol}: {report.protocol_summary}"),
        ("prompt", report.prompt),
        ("decoding", "greedy"),
        ("seed", str(report.seed)),
        ("backend", "; ".join(backends) or report.backend),
        ("intervals", _INTERVALS),
    )


def _interval(interval: Interval, sign: str = "") -> str:
    low, high = (100 * end for end in interval)
    return f"{low:{sign}.1f} to {high:{sign}.1f}"


def _accuracy(report: EvaluationReport, lead: str) -> Section:
    rows = report.rows
    lacking = any(row.num_unusable for row in rows)
    unusable: dict[str, Callable[[SettingRow], object]] = {
        "not asked": lambda row: row.num_unusable,
        "Acc@0.5 without those": lambda row: percent(row.acc_at_50_usable),
    }
    notes = [f"{name}: {text}" for name, text in report.misalignments.items()]
    if any(row.num_tolerant for row in rows):
        notes.append("Read with tolerance: a box that is not written as the model should write it.")
    if any(row.num_out_of_scale for row in rows):
        notes.append("Out of scale: the part of the box that is inside the image is judged.")
    if lacking:
        notes.append(
            "Not asked, or not to be judged: the image is missing, broken or of another size "
            "than annotated, or the model refuses the text."
        )
    table = Table.of(
        f"Acc@0.5 by the protocol {report.protocol}",
        rows,
        {
            "setting": lambda row: row.name,
            "Acc@0.5": lambda row: percent(row.acc_at_50),
            "95 % interval": lambda row: _interval(row.ci95),
            "of unpruned": lambda row: percent(row.recovered),
            "mean IoU": lambda row: f"{row.mean_iou:.3f}",
            "without a box": lambda row: row.parse_failures,
            "read with tolerance": lambda row: row.num_tolerant,
            "out of scale": lambda row: row.num_out_of_scale,
            "cut off": lambda row: row.num_cut_off,
            "visual tokens": lambda row: f"{row.mean_visual_tokens:.1f}",
            "expressions": lambda row: row.n,
            "images": lambda row: row.num_images,
            **(unusable if lacking else {}),
        },
        notes=notes,
    )
    others = _spread(
        "Acc@0.5 of the same answers by other protocols",
        rows,
        lambda row: row.other_protocols,
        percent,
        notes=[
            "To be compared with published figures, and not to be mixed with the ones above. An "
            "answer that a protocol does not read is wrong under it: Shikra's reads no box with "
            "spaces in it."
        ],
    )
    figures = [Figure(caption=f"Acc@0.5: {lead}.", draw=partial(draw_accuracies, rows))]
    if any(row.positions == "gap" for row in rows):
        counts = sorted({round(row.mean_visual_tokens) for row in rows})
        caption = (
            f"Acc@0.5 by visual tokens the decoder reads: {len(rows)} settings, {counts[0]} to "
            f"{counts[-1]} tokens."
        )
        figures.append(Figure(caption=caption, draw=partial(draw_tokens, rows)))
    return Section(title="Accuracy", tables=(table, others), figures=tuple(figures))


def _spread(
    title: str,
    rows: Sequence[SettingRow],
    values_of: Callable[[SettingRow], Mapping[str, _Value]],
    cell: Callable[[_Value], object],
    *,
    more: Mapping[str, Callable[[SettingRow], object]] = MappingProxyType({}),
    notes: Sequence[str] = (),
) -> Table:
    """A table with a column for each name that settings have values for, after ``more`` columns.

    Settings without values are left out.
    """
    rows = [row for row in rows if values_of(row)]

    def column(name: str, row: SettingRow) -> object:
        values = values_of(row)
        return cell(values[name]) if name in values else ""

    columns = {name: partial(column, name) for name in names_of(map(values_of, rows))}
    return Table.of(title, rows, {"setting": lambda row: row.name, **more, **columns}, notes=notes)


def _comparisons(report: EvaluationReport) -> Table:
    return Table.of(
        "two settings over the same expressions, counted at Acc@0.5",
        report.comparisons,
        {
            "first": lambda pair: pair.first,
            "second": lambda pair: pair.second,
            "both right": lambda pair: pair.both,
            "first alone": lambda pair: pair.only_first,
            "second alone": lambda pair: pair.only_second,
            "none": lambda pair: pair.neither,
            "difference in points": lambda pair: f"{100 * pair.difference:+.1f}",
            "95 % interval": lambda pair: _interval(pair.ci95, "+"),
            "McNemar p": lambda pair: p_value(pair.mcnemar_p),
        },
        notes=[
            "p: exact, two-sided, not corrected for the number of comparisons. Expressions about "
            "one image are treated as independent here, so it is a little small."
        ],
    )


def _groups(
    what: str,
    title: str,
    groups_of: Callable[[SettingRow], Mapping[str, Accuracy]],
    rows: Sequence[SettingRow],
    panels: Sequence[Panel],
) -> Section:
    """A column for each group, with the number of its expressions in the header."""
    sizes = {name: group.n for row in rows for name, group in groups_of(row).items()}
    table = _spread(
        f"Acc@0.5 and its 95 % interval by {what}; in brackets the number of expressions",
        rows,
        lambda row: {f"{name} ({sizes[name]})": one for name, one in groups_of(row).items()},
        lambda group: f"{percent(group.acc_at_50)} ({_interval(group.ci95)})",
    )
    caption = f"Acc@0.5 with its 95 % interval by {what}; the numbers are in the table."
    return Section(
        title=f"Accuracy by {title}",
        tables=(table,),
        figures=(Figure(caption=caption, draw=partial(draw_groups, panels, groups_of)),),
    )


def _latency(rows: Sequence[SettingRow]) -> Section:
    stages = stages_of(rows)
    more: dict[str, Callable[[SettingRow], object]] = {
        "backend": lambda row: row.backend,
        "expressions a batch": lambda row: f"{row.mean_batch_size:.1f}",
    }
    if len({row.backend for row in rows}) == 1:
        del more["backend"]
    table = _spread(
        "milliseconds by stage: median / 95th percentile",
        rows,
        lambda row: {name: row.latency_ms[name] for name in stages if name in row.latency_ms},
        lambda times: f"{times['median']:.1f} / {times['p95']:.1f}",
        more=more,
        notes=[
            "Times are of a batch: the expressions about one image that are asked together. They "
            "were measured while the evaluation ran, beside all else that ran; compare settings by "
            "them, not machines."
        ],
    )
    caption = "Each mark is a median; its line ends at the 95th percentile. See the table."
    return Section(
        title="Latency",
        tables=(table,),
        figures=(Figure(caption=caption, draw=partial(draw_latencies, rows)),),
    )


def _costs(rows: Sequence[SettingRow]) -> Table:
    """Beside a smaller image: what is multiplied and waited for before the first token."""
    stages = ("vision", "prefill")

    def multiplied(row: SettingRow, *names: str) -> str:
        return f"{sum(row.multiply_adds[name] for name in names) / 1e9:,.3g} G"

    def waited(row: SettingRow) -> str:
        times = [row.latency_ms[one]["median"] for one in BEGINNING if one in row.latency_ms]
        return f"{sum(times):.1f}"

    return Table.of(
        "a smaller image, of which nothing is dropped, is the rival of pruning",
        [row for row in rows if row.multiply_adds],
        {
            "setting": lambda row: row.name,
            "visual tokens": lambda row: f"{row.mean_visual_tokens:.1f}",
            "Acc@0.5": lambda row: percent(row.acc_at_50),
            **{
                f"multiply-adds, {one}": partial(lambda one, r: multiplied(r, one), one)
                for one in stages
            },
            "together": lambda row: multiplied(row, *stages),
            "ms, vision and prefill": waited,
        },
        notes=[
            "Multiply-adds of matrix products and convolutions, of one expression at the mean "
            "length of prompts. Milliseconds: the medians of those stages, of a batch. A smaller "
            "image has the aspect of the larger one and the nearest number of tokens there is."
        ],
    )


def _gallery(report: EvaluationReport) -> Table:
    def iou(setting: str, item: GalleryItem) -> str:
        return next((f"{one.iou:.2f}" for one in item.answers if one.setting == setting), "")

    return Table.of(
        "IoU of some answers; chosen by the first setting with GAP",
        report.gallery,
        {
            "question": lambda item: item.question_id,
            "why": lambda item: TITLES[item.kind],
            "expression": lambda item: item.expression,
            **{row.name: partial(iou, row.name) for row in report.rows},
        },
    )


def _unusable(report: EvaluationReport) -> tuple[Table, Table]:
    unusable = report.data.unusable
    counts = Counter((one.reason, one.counts_as_wrong) for one in unusable)
    reasons = Table.of(
        "expressions by reason",
        counts.most_common(),
        {
            "reason": lambda counted: counted[0][0],
            "expressions": lambda counted: counted[1],
            "in the accuracy": lambda counted: "counted as wrong" if counted[0][1] else "left out",
        },
    )
    each = Table.of(
        "each of them",
        unusable,
        {
            "question": lambda one: one.question_id,
            "split": lambda one: one.split,
            "reason": lambda one: one.reason,
            "seen": lambda one: one.detail,
        },
    )
    return reasons, each
