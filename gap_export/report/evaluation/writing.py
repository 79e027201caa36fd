"""Writing reports: each file whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path

from gap_export.evaluation.results import EvaluationReport
from gap_export.extras import require_extra
from gap_export.outputs import NO_RULE, OutputRule
from gap_export.report.evaluation.markdown import render_markdown
from gap_export.report.parity.writing import HTML, JSON, MARKDOWN, write_markdown

SCHEMA_FILE = Path(__file__).with_name("report.schema.json")


def write_reports(
    report: EvaluationReport,
    *,
    json_path: Path | None = None,
    markdown_path: Path | None = None,
    html_path: Path | None = None,
    rule: OutputRule = NO_RULE,
) -> None:
    """Write a report into files; earlier reports are replaced, a GitHub job's summary added to.

    Args:
        report: What was found.
        json_path: For programs; see ``SCHEMA_FILE``.
        markdown_path: For a job's summary.
        html_path: A page that needs nothing but itself, with plots and pictures.
        rule: What the files must stay away from.

    Raises:
        MissingDependencyError: the page is asked for, and the extra ``report`` is not installed.
        OutputError: a file cannot, or must not, be written; those before it are there.
        ValueError: a row is of another model than the report: tables of two would be compared.
    """
    check_writable(json_path=json_path, markdown_path=markdown_path, html_path=html_path, rule=rule)
    _check_one_model(report)
    if json_path is not None:
        text = json.dumps(report.to_plain(), indent=2, allow_nan=False) + "\n"
        rule.write(JSON, json_path, text.encode())
    if markdown_path is not None:
        write_markdown(markdown_path, render_markdown(report), rule)
    if html_path is not None:
        from gap_export.report.evaluation.html import render_html

        rule.write(HTML, html_path, render_html(report).encode())


def check_writable(
    *,
    json_path: Path | None = None,
    markdown_path: Path | None = None,
    html_path: Path | None = None,
    rule: OutputRule = NO_RULE,
) -> None:
    """Refuse reports that could not be written, before the work; see :func:`write_reports`.

    Args:
        json_path: As there.
        markdown_path: As there.
        html_path: As there.
        rule: As there.

    Raises:
        MissingDependencyError: the page is asked for, and the extra ``report`` is not installed.
        OutputError: a file could not, or must not, be written, or two reports would be one file.
    """
    if html_path is not None:
        require_extra("report", "writing a page of HTML")
    rule.check({JSON: json_path, MARKDOWN: markdown_path, HTML: html_path})


def _check_one_model(report: EvaluationReport) -> None:
    """What was trained to lose tokens is another model: it has no row beside one that was not."""
    others = sorted({row.model for row in report.rows} - {report.model})
    if others:
        raise ValueError(f"rows of {', '.join(others)} in a report of {report.model}")
