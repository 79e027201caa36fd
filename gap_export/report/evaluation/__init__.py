"""Reports of an evaluation: JSON for programs, Markdown and a page of HTML for people.

The JSON form is that of :meth:`gap_export.evaluation.results.EvaluationReport.to_plain`;
``SCHEMA_FILE`` is its JSON Schema. Expressions, names of splits and answers come from data sets and
models, so every format escapes them, and makes characters visible that are none to be printed.
"""

from __future__ import annotations

from gap_export.report.evaluation.markdown import render_markdown
from gap_export.report.evaluation.writing import SCHEMA_FILE, check_writable, write_reports

__all__ = ["SCHEMA_FILE", "check_writable", "render_markdown", "write_reports"]
