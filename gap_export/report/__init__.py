"""Reports of a check and of an evaluation: JSON for programs, JUnit XML for CI, Markdown and HTML.

The JSON forms are those of ``to_plain`` of :class:`gap_export.parity.results.CheckReport` and
:class:`gap_export.evaluation.results.EvaluationReport`; ``CHECK_SCHEMA`` and ``EVALUATION_SCHEMA``
are their JSON Schemas. For people each report first becomes a `Document`, which the writers
render. Names, expressions and answers come from bundles, data sets and
models: characters that cannot be printed become visible, and every format escapes the rest.
"""

from __future__ import annotations

from pathlib import Path

from gap_export.report.writing import check_writable, document_of, write_reports

__all__ = [
    "CHECK_SCHEMA",
    "EVALUATION_SCHEMA",
    "check_writable",
    "document_of",
    "write_reports",
]

CHECK_SCHEMA = Path(__file__).with_name("check.schema.json")
EVALUATION_SCHEMA = Path(__file__).with_name("evaluation.schema.json")
