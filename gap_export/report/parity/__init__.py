"""Reports of a check: JSON for programs, JUnit XML for CI, Markdown and a page of HTML for people.

The JSON form is that of :meth:`gap_export.parity.results.CheckReport.to_plain`; ``SCHEMA_FILE`` is
its JSON Schema. Names, expressions and answers come from bundles and users, so every format escapes
them, and makes characters visible that are none to be printed.
"""

from __future__ import annotations

from gap_export.report.parity.writing import SCHEMA_FILE, check_writable, write_reports

__all__ = ["SCHEMA_FILE", "check_writable", "write_reports"]
