"""Markdown for a job's summary, as GitHub's and GitLab's readers take it."""

from __future__ import annotations

import re

from gap_export.parity.report.words import (
    STATUS_WORDS,
    Table,
    backend_title,
    clean,
    describe_figures,
    facts,
    overview,
    problems,
    tables,
    verdict,
)
from gap_export.parity.results import BackendResult, CheckReport

# A number of a character stands for the character and for nothing else: no markup, no link, no
# mention and no end of a cell begins with one. (CommonMark 0.31, section 2.5.)
_SPECIAL = re.compile(r"[^\w .,%()+=-]|\n|(?<=\w)\.(?=[^\W\d])|_")
# What begins a list or a rule only where it stands first.
_START = re.compile(r"^(\s*)([-+=](?!\d)|\d+[.)](?!\d))")
# A summary is for reading; all of it is in the other formats. GitHub cuts at 1 MiB.
_MAX_ROWS = 50


def to_markdown(report: CheckReport) -> str:
    """A report for people, without the tensors inside graphs that are as they should be."""
    lines = [f"# gap-export check: {verdict(report)}", ""]
    lines += [f"- {name}: {escape(value)}" for name, value in facts(report)]
    found = problems(report)
    if found:
        lines += ["", "**What is wrong**", "", *(f"- {escape(text)}" for text in found)]
    for backend in report.backends:
        lines += _backend_lines(backend)
    return "\n".join(lines) + "\n"


def _backend_lines(backend: BackendResult) -> list[str]:
    title = f"{escape(backend_title(backend))} ({backend.seconds:.1f} s)"
    levels = [
        (
            ", ".join(names),
            STATUS_WORDS[level.status],
            ". ".join(filter(None, (clean(level.reason), describe_figures(level)))),
        )
        for names, level in overview(backend)
    ]
    found = Table(title="", header=("level", "verdict", "details"), rows=tuple(levels))
    lines = ["", f"## {title}", "", *table_lines(found, range(len(levels)))]
    for level in backend.levels:
        for table in tables(level):
            # Of tensors inside graphs there may be hundreds.
            shown = sorted(table.bad) if "module" in table.header else range(len(table.rows))
            if shown:
                name = f"{level.level}: {table.title}"
                lines += ["", f"### {name}", "", *table_lines(table, shown)]
                lines += ["", *(f"- {escape(note)}" for note in table.notes)]
    return lines


def table_lines(table: Table, shown: range | list[int]) -> list[str]:
    """A table without its title and notes; of its rows those that are shown, up to a limit."""
    lines = [f"| {' | '.join(map(escape, table.header))} |", f"|{' --- |' * len(table.header)}"]
    lines += [f"| {' | '.join(map(escape, table.rows[row]))} |" for row in shown[:_MAX_ROWS]]
    if len(shown) > _MAX_ROWS:
        lines += ["", f"{len(shown) - _MAX_ROWS} more are left out here."]
    return lines


def escape(text: str) -> str:
    """Text that stays text in Markdown, in one line."""
    escaped = _SPECIAL.sub(lambda found: f"&#{ord(found.group())};", text)
    return _START.sub(lambda found: f"{found[1]}&#{ord(found[2][0])};{found[2][1:]}", escaped)
