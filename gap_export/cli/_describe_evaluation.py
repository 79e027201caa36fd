"""An evaluation for people at a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from gap_export.cli._terminal import format_table
from gap_export.report.evaluation import describe_frame
from gap_export.report.panels import BEGINNING
from gap_export.visible import visible, visible_strings

if TYPE_CHECKING:
    from gap_export.evaluation.results import EvaluationReport, SettingRow

_HEADER = (
    "pruner",
    "keep",
    "tokens",
    "positions",
    "Acc@0.5 %",
    "95 % interval",
    "recovered %",
    "IoU %",
    "no box",
)


def describe_evaluation(report: EvaluationReport) -> str:
    """What was asked, a table of the rows, and what could not be asked."""
    report = replace(
        report,
        data=visible_strings(report.data),
        rows=visible_strings(report.rows),
        misalignments=visible_strings(report.misalignments),
        model=visible(report.model),
    )
    first, data = report.rows[0], report.data
    lines = [
        f"{report.model} on {data.name}, {', '.join(data.splits)}, seed {report.seed}: "
        f"{first.n} expressions, {first.num_images} images",
        f"protocol {report.protocol}: {report.protocol_summary}",
        f"frame: {describe_frame(report)}",
        "",
        format_table(_HEADER, [_table_row(row) for row in report.rows]),
    ]
    lines += _absences(report)
    lines += _costs(report.rows)
    texts = {row.pruner: row.pruner_text for row in report.rows if row.pruner_text is not None}
    lines += [f"{name}: the pruner reads the {text}" for name, text in texts.items()]
    lines += [f"{name}: {what}" for name, what in report.misalignments.items()]
    for row in report.rows:
        given = row.n - row.num_unusable
        for what, number in (("out of scale", row.num_out_of_scale), ("cut off", row.num_cut_off)):
            if number:
                lines.append(f"{row.name}: {what}: {number} of {given}")
    return "\n".join([*lines, *_unusable(report)])


def _table_row(row: SettingRow) -> list[str]:
    low, high = row.ci95
    return [
        row.pruner,
        f"{row.keep_ratio:g}",
        f"{row.mean_visual_tokens:.1f}".removesuffix(".0"),
        row.positions,
        f"{100 * row.acc_at_50:.1f}",
        f"{100 * low:.1f}-{100 * high:.1f}",
        "-" if row.recovered is None else f"{100 * row.recovered:.1f}",
        f"{100 * row.mean_iou:.1f}",
        str(row.parse_failures),
    ]


def _absences(report: EvaluationReport) -> list[str]:
    """How well scores tell what is not there, where that was asked."""
    rows = []
    for row in report.rows:
        if (one := row.absence) is not None:
            (low, high), (least, most) = one.auroc_ci95, one.false_box_ci95
            rows.append(
                [
                    row.name,
                    f"{one.auroc:.3f}",
                    f"{low:.3f}-{high:.3f}",
                    f"{100 * one.false_box_rate:.1f}",
                    f"{100 * least:.1f}-{100 * most:.1f}",
                    f"{100 * one.recall:.1f}",
                    f"{one.num_boxes} of {one.num_absent}",
                ]
            )
    if not rows:
        return []
    header = ("what is not there", "AUROC", "95 % interval", "false boxes %", "95 % interval")
    return ["", format_table((*header, "at recall %", "boxes at any score"), rows)]


def _costs(rows: Sequence[SettingRow]) -> list[str]:
    """What is multiplied and waited for before an answer begins, where that is counted."""
    costly = [row for row in rows if row.multiply_adds]
    if not costly:
        return []
    whole = sum(costly[0].multiply_adds.values())
    table = [
        [
            row.name,
            *(f"{number / 1e9:.3g}" for number in row.multiply_adds.values()),
            f"{100 * sum(row.multiply_adds.values()) / whole:.0f}",
            *(
                f"{row.latency_ms[one]['median']:.1f}" if one in row.latency_ms else "-"
                for one in BEGINNING
            ),
        ]
        for row in costly
    ]
    header = ("until the answer begins", *(f"{one} GMAC" for one in costly[0].multiply_adds))
    header += ("of unpruned %", *(f"{one} ms" for one in BEGINNING))
    return ["", format_table(header, table)]


def _unusable(report: EvaluationReport) -> list[str]:
    """What was wrong with the data, and what that does to the figures."""
    lines = []
    for counted, what in (
        (True, "not asked, and counted as wrong"),
        (False, "left out, annotated so that no answer could be right"),
    ):
        reasons = Counter(
            one.reason for one in report.data.unusable if one.counts_as_wrong is counted
        )
        if reasons:
            told = ", ".join(f"{reason} {times}" for reason, times in reasons.items())
            number = sum(reasons.values())
            lines.append(f"{number} expression{'s' if number > 1 else ''} {what}: {told}")
    for row in report.rows:
        if row.num_unusable:
            share = "-" if row.acc_at_50_usable is None else f"{100 * row.acc_at_50_usable:.1f} %"
            lines.append(
                f"{row.name}: {share} of the others; {row.num_unusable} could not be asked"
            )
    return lines
