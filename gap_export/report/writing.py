"""Writing reports: each file whole or not at all, by the rule of :mod:`gap_export.outputs`."""

from __future__ import annotations

import json as json_format
from pathlib import Path

from gap_export.benchmark.results import BenchReport
from gap_export.errors import OutputError
from gap_export.evaluation.results import EvaluationReport
from gap_export.extras import require_extra
from gap_export.outputs import MARKDOWN_END, NO_RULE, OutputRule, is_step_summary
from gap_export.parity.results import CheckReport
from gap_export.planning.results import PlanReport
from gap_export.report.bench import document_of_bench
from gap_export.report.check import document_of_check
from gap_export.report.document import Document
from gap_export.report.evaluation import document_of_evaluation
from gap_export.report.junit import to_junit
from gap_export.report.markdown import to_markdown
from gap_export.report.plan import document_of_plan

# What messages call the files.
_JSON, _JUNIT = "the JSON report", "the JUnit report"
_MARKDOWN, _HTML = "the Markdown report", "the HTML report"


def write_reports(
    report: CheckReport | EvaluationReport | BenchReport | PlanReport,
    *,
    json: Path | None = None,
    junit: Path | None = None,
    markdown: Path | None = None,
    html: Path | None = None,
    rule: OutputRule = NO_RULE,
) -> None:
    """Write a report into files; earlier reports are replaced, a GitHub job's summary added to.

    Args:
        report: What was found.
        json: For programs; see ``CHECK_SCHEMA`` and ``EVALUATION_SCHEMA``.
        junit: XML of a check that GitHub, GitLab and Jenkins read.
        markdown: For a job's summary.
        html: A page that needs nothing but itself.
        rule: What the files must stay away from.

    Raises:
        MissingDependencyError: the page is asked for, and the extra ``report`` is not installed.
        OutputError: a file cannot, or must not, be written; those before it are there.
        ValueError: a row is of another model than the report: tables of two would be compared.
    """
    check_writable(json=json, junit=junit, markdown=markdown, html=html, rule=rule)
    document = document_of(report)
    if json is not None:
        text = json_format.dumps(report.to_plain(), indent=2, allow_nan=False) + "\n"
        rule.write(_JSON, json, text.encode())
    if junit is not None:
        assert isinstance(report, CheckReport), "only a check has test cases"
        rule.write(_JUNIT, junit, to_junit(report).encode())
    if markdown is not None:
        text = _kept_summary(markdown) + to_markdown(document) + MARKDOWN_END
        rule.write(_MARKDOWN, markdown, text.encode())
    if html is not None:
        from gap_export.report.html import to_html

        rule.write(_HTML, html, to_html(document).encode())


def check_writable(
    *,
    json: Path | None = None,
    junit: Path | None = None,
    markdown: Path | None = None,
    html: Path | None = None,
    rule: OutputRule = NO_RULE,
) -> None:
    """Refuse reports that could not be written, before the work.

    The arguments are those of :func:`write_reports`.

    Raises:
        MissingDependencyError: the page is asked for, and the extra ``report`` is not installed.
        OutputError: a file could not, or must not, be written, or two reports would be one file.
    """
    if html is not None:
        require_extra("report", "writing a page of HTML")
    rule.check({_JSON: json, _JUNIT: junit, _MARKDOWN: markdown, _HTML: html})


def document_of(report: CheckReport | EvaluationReport | BenchReport | PlanReport) -> Document:
    """What a report says to people.

    Raises:
        ValueError: a row is of another model than the report.
    """
    if isinstance(report, CheckReport):
        return document_of_check(report)
    if isinstance(report, BenchReport):
        return document_of_bench(report)
    if isinstance(report, PlanReport):
        return document_of_plan(report)
    # A model that was trained to lose tokens is another model, which has no row beside this one.
    others = sorted({row.model for row in report.rows} - {report.model})
    if others:
        raise ValueError(f"rows of {', '.join(others)} in a report of {report.model}")
    return document_of_evaluation(report)


def _kept_summary(path: Path) -> str:
    """What other commands of a GitHub step wrote into its summary; empty for any other file.

    Raises:
        OutputError: it cannot be read.
    """
    if not is_step_summary(path) or not path.exists():
        return ""
    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as err:
        raise OutputError(
            f"{_MARKDOWN} is to follow what cannot be read",
            seen=f"{path}: {err}",
            fix="name another file",
        ) from err
    return before + "\n" if before else ""
