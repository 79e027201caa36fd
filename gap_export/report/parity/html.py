"""One page of HTML that needs nothing but itself, for people to read and to keep."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gap_export.parity.results import (
    SCHEMA_VERSION,
    BackendResult,
    CheckReport,
    LevelResult,
    TensorRow,
    number,
)
from gap_export.report.parity.page import load_page
from gap_export.report.parity.plots import draw_errors, tolerated
from gap_export.report.parity.words import (
    STATUS_WORDS,
    Table,
    backend_title,
    describe_figures,
    facts,
    overview,
    problems,
    tables,
    tensor_rows,
    verdict,
)
from gap_export.version import __version__
from gap_export.visible import clean

_TEMPLATE = Path(__file__).with_name("page.html.j2")


@dataclass(frozen=True, kw_only=True)
class _Plot:
    """A picture, and in words what it shows."""

    title: str
    summary: str
    svg: str


@dataclass(frozen=True, kw_only=True)
class _LevelView:
    names: tuple[str, ...]
    status: str
    word: str
    reason: str
    figures: str
    tables: tuple[Table, ...]
    plots: tuple[_Plot, ...]


@dataclass(frozen=True, kw_only=True)
class _BackendView:
    title: str
    seconds: float
    levels: tuple[_LevelView, ...]
    divergences: tuple[str, ...]


def to_html(report: CheckReport) -> str:
    """A report as a page; the extra ``report`` is installed."""
    template = load_page(_TEMPLATE)
    backends = [_backend_view(f"b{n}", each) for n, each in enumerate(report.backends)]
    return template.render(
        verdict=verdict(report),
        passed=report.passed,
        facts=facts(report),
        problems=problems(report),
        backends=backends,
        version=__version__,
        schema_version=SCHEMA_VERSION,
    )


def _backend_view(mark: str, backend: BackendResult) -> _BackendView:
    return _BackendView(
        title=backend_title(backend),
        seconds=backend.seconds,
        levels=tuple(
            _level_view(f"{mark}-{level.level}", names, level) for names, level in overview(backend)
        ),
        divergences=tuple(each.describe() for each in backend.divergences),
    )


def _level_view(mark: str, names: tuple[str, ...], level: LevelResult) -> _LevelView:
    return _LevelView(
        names=names,
        status=level.status,
        word=STATUS_WORDS[level.status],
        reason=clean(level.reason),
        figures=describe_figures(level),
        tables=tables(level),
        plots=_plots(mark, level),
    )


def _plots(mark: str, level: LevelResult) -> tuple[_Plot, ...]:
    """One of all outputs; of tensors inside graphs, where there are any, one for each graph."""
    groups: dict[str, list[TensorRow]] = {}
    for row in tensor_rows(level):
        title = f"{clean(row.component)}, layer by layer" if row.module else "outputs of the graphs"
        groups.setdefault(title, []).append(row)
    plots = []
    for index, (title, rows) in enumerate(groups.items()):
        worst = max(rows, key=lambda row: _severity(row.max_abs_diff, tolerated(row)))
        summary = (
            f"Tensors: {len(rows)}, beyond tolerance: {sum(not row.passed for row in rows)}. "
            f"Nearest to it, or furthest beyond: {clean(worst.tensor)}, off by "
            f"{number(worst.max_abs_diff)} of {number(tolerated(worst))} allowed."
        )
        svg = draw_errors(rows, mark=f"{mark}-{index}")
        plots.append(_Plot(title=title, summary=summary, svg=svg))
    return tuple(plots)


def _severity(error: float, allowed: float) -> float:
    if allowed > 0:
        return error / allowed
    return float("inf") if error > 0 else 0.0
