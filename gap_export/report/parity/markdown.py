"""Markdown for a job's summary, as GitHub's and GitLab's readers take it."""

from __future__ import annotations

import re

from gap_export.parity.results import BackendResult, CheckReport
from gap_export.report.parity.words import (
    STATUS_WORDS,
    Table,
    backend_title,
    describe_figures,
    facts,
    overview,
    problems,
    tables,
    verdict,
)
from gap_export.visible import clean

# What would be markup, a link, a mention or the end of a cell; all else stays as it is, so that the
# file can be read without a reader of Markdown too. (CommonMark 0.31, sections 2.4 and 2.5; GFM
# 0.29, sections 4.10 and 6.9; GitHub's and GitLab's references to people, issues and emoji.)
_SPECIAL = re.compile(
    r"""
    [\\`*\[\]<>|~$&\n\t]
    | (?<![^\W_])_ | _(?![^\W_])          # within a word it is no emphasis
    | @(?!(?<=\w@)\d\.\d(?![\w.-]))       # but in Acc@0.5 it is no address
    | [\#!%](?=\w)
    | :(?=//) | :(?=[\w+-]+:)
    | (?<=\bwww)\.
    """,
    re.VERBOSE | re.IGNORECASE,
)
_BACKSLASHED = "\\`*[]~$_"
# What begins a list or a rule only where it stands first.
_START = re.compile(r"^(\s*)([-+=](?!\d)|\#+(?=\s|$)|\d+[.)](?!\d))")
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
    """Text that stays text in Markdown, in one line; what needs no escaping is left as it is."""
    visible = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    escaped = _SPECIAL.sub(lambda found: _escape_one(found.group()), visible)
    return _START.sub(lambda found: f"{found[1]}{_number(found[2][0])}{found[2][1:]}", escaped)


def _escape_one(character: str) -> str:
    return f"\\{character}" if character in _BACKSLASHED else _number(character)


def _number(character: str) -> str:
    """A number of a character, which is the character and no markup."""
    return f"&#{ord(character)};"
