"""One page of HTML that needs nothing but itself, for people to read and to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gap_export.evaluation.results import SCHEMA_VERSION, EvaluationReport, SettingRow
from gap_export.report.evaluation.gallery import Shelf, gallery_shelves
from gap_export.report.evaluation.plots import (
    draw_accuracies,
    draw_groups,
    draw_latencies,
    draw_thresholds,
    draw_tokens,
)
from gap_export.report.evaluation.words import (
    Section,
    SectionName,
    by_kind,
    by_split,
    facts,
    headline,
    page_title,
    panels,
    sections,
)
from gap_export.report.parity.page import load_page
from gap_export.report.parity.words import Table
from gap_export.version import __version__

_TEMPLATE = Path(__file__).with_name("page.html.j2")
# A page of ten thousand rows is read by nobody; all of them are in the JSON form.
_MAX_ROWS = 500


@dataclass(frozen=True, kw_only=True)
class _Plot:
    """A picture, and in words what it shows."""

    mark: str
    summary: str
    svg: str


@dataclass(frozen=True, kw_only=True)
class _SectionView:
    title: str
    plots: tuple[_Plot, ...]
    tables: tuple[Table, ...]
    shelves: tuple[Shelf, ...]


def render_html(report: EvaluationReport) -> str:
    """A report as a page; the extra ``report`` is installed."""
    template = load_page(_TEMPLATE)
    return template.render(
        title=page_title(report),
        headline=headline(report),
        warnings=report.warnings,
        facts=facts(report),
        sections=[_view(report, section) for section in sections(report)],
        version=__version__,
        schema_version=SCHEMA_VERSION,
    )


def _view(report: EvaluationReport, section: Section) -> _SectionView:
    return _SectionView(
        title=section.title,
        plots=_plots(report, section.name),
        tables=tuple(map(_shortened, section.tables)),
        shelves=gallery_shelves(report) if section.name == "gallery" else (),
    )


def _plots(report: EvaluationReport, name: SectionName) -> tuple[_Plot, ...]:
    rows, groups = report.rows, panels(report.rows)
    if name == "accuracy":
        plots = [_plot("accuracies", draw_accuracies(rows, mark="accuracies"), headline(report))]
        if any(row.positions == "gap" for row in rows):
            summary = f"Acc@0.5 by visual tokens the decoder reads: {_tokens_in_words(rows)}."
            plots.append(_plot("tokens", draw_tokens(rows, mark="tokens"), summary))
        return tuple(plots)
    if name == "thresholds":
        summary = "Share of hits falls as the threshold of IoU rises; the numbers are in the table."
        return (_plot("thresholds", draw_thresholds(groups, mark="thresholds"), summary),)
    if name in ("kinds", "splits"):
        groups_of = by_kind if name == "kinds" else by_split
        summary = f"Acc@0.5 with its 95 % interval by {name[:-1]}; the numbers are in the table."
        return (_plot(name, draw_groups(groups, groups_of, mark=name), summary),)
    if name == "latency":
        summary = "Each mark is a median; its line ends at the 95th percentile. See the table."
        return (_plot("latency", draw_latencies(rows, mark="latency"), summary),)
    return ()


def _plot(mark: str, svg: str, summary: str) -> _Plot:
    # A reader that cannot see it is told what is written below it.
    named = svg.replace('role="img"', f'role="img" aria-labelledby="{mark}-caption"', 1)
    return _Plot(mark=mark, summary=summary, svg=named)


def _tokens_in_words(rows: Sequence[SettingRow]) -> str:
    counts = sorted({round(row.mean_visual_tokens) for row in rows})
    return f"{len(rows)} settings, {counts[0]} to {counts[-1]} tokens"


def _shortened(table: Table) -> Table:
    left_out = len(table.rows) - _MAX_ROWS
    if left_out <= 0:
        return table
    return Table(
        title=table.title,
        header=table.header,
        rows=table.rows[:_MAX_ROWS],
        notes=(*table.notes, f"{left_out} more are in the JSON form of this report."),
    )
