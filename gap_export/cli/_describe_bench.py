"""A benchmark or a plan for people at a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gap_export.cli._terminal import format_table
from gap_export.report import document_of

if TYPE_CHECKING:
    from gap_export.benchmark.results import BenchReport
    from gap_export.planning.results import PlanReport


def describe_report(report: BenchReport | PlanReport) -> str:
    """The tables of the report, and what it comes to."""
    document = document_of(report)
    lines = [document.title, *(f"{name}: {value}" for name, value in document.facts)]
    for section in document.sections:
        for table in section.tables:
            if table.rows:
                lines += ["", f"{section.title}: {table.title}"]
                lines.append(format_table(table.header, [list(row) for row in table.rows]))
    return "\n".join([*lines, "", *(f"{tile.label}: {tile.value}" for tile in document.tiles)])
