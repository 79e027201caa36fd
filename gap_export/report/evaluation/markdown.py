"""Markdown for a job's summary, as GitHub's and GitLab's readers take it."""

from __future__ import annotations

from gap_export.evaluation.results import EvaluationReport
from gap_export.report.evaluation.words import facts, headline, page_title, sections
from gap_export.report.parity.markdown import escape, table_lines
from gap_export.visible import clean


def render_markdown(report: EvaluationReport) -> str:
    """A report for people, without plots and pictures; of long tables the first rows."""
    lines = [f"# {escape(page_title(report))}", "", escape(headline(report)), ""]
    for text in report.warnings:
        lines += [f"**Warning:** {escape(clean(text))}", ""]
    lines += [f"- {name}: {escape(value)}" for name, value in facts(report)]
    for section in sections(report):
        lines += ["", f"## {section.title}"]
        for table in section.tables:
            lines += ["", f"**{escape(table.title)}**", ""]
            lines += table_lines(table, range(len(table.rows)))
            if table.notes:
                lines += ["", *(f"- {escape(note)}" for note in table.notes)]
    return "\n".join(lines) + "\n"
