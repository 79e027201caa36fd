"""Markdown for a job's summary, as GitHub's and GitLab's readers take it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from gap_export.report.document import STATUS_WORDS, Document, Table

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


def to_markdown(document: Document) -> str:
    """Write a report as text and tables, without figures and images; long tables are cut."""
    lines = [f"# {escape(document.heading)}", ""]
    if document.lead:
        lines += [escape(document.lead), ""]
    if document.problems:
        lines += [f"**{document.problems_title}**", ""]
        lines += [*(f"- {escape(text)}" for text in document.problems), ""]
        # Without a heading between them, the facts would be of the same list.
        lines += ["**Facts**", ""]
    lines += [f"- {name}: {escape(value)}" for name, value in document.facts]
    for section in document.sections:
        # A summary leaves out what is as it should be, of tables with hundreds of rows.
        tables = [
            (table, sorted(table.failed) if table.is_long else range(len(table.rows)))
            for table in section.tables
        ]
        if not any(shown for _, shown in tables):
            continue
        word = f": {STATUS_WORDS[section.status]}" if section.status else ""
        lines += ["", f"{'#' * section.depth} {escape(section.title)}{word}"]
        for table, shown in tables:
            if shown:
                lines += ["", f"**{escape(table.title)}**", "", *_table_lines(table, shown)]
                lines += ["", *(f"- {escape(note)}" for note in table.notes)]
    return "\n".join(lines).rstrip() + "\n"


def _table_lines(table: Table, shown: Sequence[int]) -> list[str]:
    numeric = table.numeric_columns()
    rules = (" ---: |" if index in numeric else " --- |" for index in range(len(table.header)))
    lines = [f"| {' | '.join(map(escape, table.header))} |", f"|{''.join(rules)}"]
    lines += [f"| {' | '.join(map(escape, table.rows[row]))} |" for row in shown[:_MAX_ROWS]]
    if len(shown) > _MAX_ROWS:
        lines += ["", f"{len(shown) - _MAX_ROWS} more are left out here."]
    return lines


def escape(text: str) -> str:
    """Text that stays text in Markdown, in one line; what needs no escaping is left as it is."""
    visible = "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
    escaped = _SPECIAL.sub(
        lambda found: f"\\{found[0]}" if found[0] in _BACKSLASHED else _number(found[0]), visible
    )
    return _START.sub(lambda found: f"{found[1]}{_number(found[2][0])}{found[2][1:]}", escaped)


def _number(character: str) -> str:
    """A number of a character, which is the character and no markup."""
    return f"&#{ord(character)};"
