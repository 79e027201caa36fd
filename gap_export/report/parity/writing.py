"""Writing reports: each file whole or not at all, by the rule of :mod:`gap_export.outputs`."""

from __future__ import annotations

import json as json_format
from pathlib import Path

from gap_export.errors import OutputError
from gap_export.extras import require_extra
from gap_export.outputs import MARKDOWN_END, NO_RULE, OutputRule, is_step_summary
from gap_export.parity.results import CheckReport
from gap_export.report.parity.junit import to_junit
from gap_export.report.parity.markdown import to_markdown

SCHEMA_FILE = Path(__file__).with_name("report.schema.json")
# What messages call them.
JSON, JUNIT = "the JSON report", "the JUnit report"
MARKDOWN, HTML = "the Markdown report", "the HTML report"


def write_reports(
    report: CheckReport,
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
        json: For programs; see ``SCHEMA_FILE``.
        junit: XML that GitHub, GitLab and Jenkins read: a test case for each backend and level.
        markdown: For a job's summary.
        html: A page that needs nothing but itself.
        rule: What the files must stay away from.

    Raises:
        MissingDependencyError: the page is asked for, and the extra ``report`` is not installed.
        OutputError: a file cannot, or must not, be written; those before it are there.
    """
    check_writable(json=json, junit=junit, markdown=markdown, html=html, rule=rule)
    if json is not None:
        text = json_format.dumps(report.to_plain(), indent=2, allow_nan=False) + "\n"
        rule.write(JSON, json, text.encode())
    if junit is not None:
        rule.write(JUNIT, junit, to_junit(report).encode())
    if markdown is not None:
        write_markdown(markdown, to_markdown(report), rule)
    if html is not None:
        from gap_export.report.parity.html import to_html

        rule.write(HTML, html, to_html(report).encode())


def write_markdown(path: Path, text: str, rule: OutputRule) -> None:
    """Write a report in Markdown; to the summary of a GitHub step it is added.

    Raises:
        OutputError: the file cannot, or must not, be written, or what is in the summary not be
            read.
    """
    rule.write(MARKDOWN, path, (_kept_summary(path) + text + MARKDOWN_END).encode())


def _kept_summary(path: Path) -> str:
    """What other commands of a GitHub step wrote into its summary; of any other file nothing.

    Raises:
        OutputError: it cannot be read.
    """
    if not is_step_summary(path) or not path.exists():
        return ""
    try:
        before = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as err:
        raise OutputError(
            f"{MARKDOWN} is to follow what cannot be read",
            seen=f"{path}: {err}",
            fix="name another file",
        ) from err
    return before + "\n" if before else ""


def check_writable(
    *,
    json: Path | None = None,
    junit: Path | None = None,
    markdown: Path | None = None,
    html: Path | None = None,
    rule: OutputRule = NO_RULE,
) -> None:
    """Refuse reports that could not be written, before the work; see :func:`write_reports`.

    Args:
        json: As there.
        junit: As there.
        markdown: As there.
        html: As there.
        rule: As there.

    Raises:
        MissingDependencyError: the page is asked for, and the extra ``report`` is not installed.
        OutputError: a file could not, or must not, be written, or two reports would be one file.
    """
    if html is not None:
        require_extra("report", "writing a page of HTML")
    rule.check({JSON: json, JUNIT: junit, MARKDOWN: markdown, HTML: html})
