"""JUnit XML: a test suite for each backend, a test case for each level.

There is no standard but what readers take: https://github.com/testmoapp/junitxml. A level that was
not run is skipped; of a backend that had to be run it is a failure.
"""

from __future__ import annotations

from xml.etree import ElementTree as ET

from gap_export.parity.results import BackendResult, CheckReport, LevelResult
from gap_export.report.parity.words import Table, backend_title, describe_figures, is_missed, tables
from gap_export.visible import clean


def to_junit(report: CheckReport) -> str:
    """A report as XML, with its declaration."""
    root = ET.Element("testsuites", name="gap-export check")
    totals = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for backend in report.backends:
        suite = _suite(report, backend)
        root.append(suite)
        for name in totals:
            totals[name] += int(suite.attrib[name])
    for name, total in totals.items():
        root.set(name, str(total))
    root.set("time", f"{sum(backend.seconds for backend in report.backends):.3f}")
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _suite(report: CheckReport, backend: BackendResult) -> ET.Element:
    suite = ET.Element("testsuite", name=f"gap-export check, {backend.backend}")
    properties = ET.SubElement(suite, "properties")
    for name, value in (
        ("bundle", report.bundle),
        ("model", report.model),
        ("pruner", report.pruner),
        ("keep_ratio", str(report.keep_ratio)),
        ("reference", report.reference),
        ("candidate", backend_title(backend)),
        ("seed", str(report.seed)),
    ):
        ET.SubElement(properties, "property", name=name, value=clean(value))
    for level in backend.levels:
        suite.append(_case(report, backend, level))
    suite.set("tests", str(len(backend.levels)))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", "0")
    suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
    suite.set("time", f"{backend.seconds:.3f}")
    return suite


def _case(report: CheckReport, backend: BackendResult, level: LevelResult) -> ET.Element:
    # A class name is cut at its dots, of which a model's name may have some.
    owner = clean(report.model).replace(".", "_")
    case = ET.Element(
        "testcase", name=level.level, classname=f"gap-export.{owner}.{backend.backend}"
    )
    reason = clean(level.reason)
    if level.status == "failed":
        failure = ET.SubElement(case, "failure", message=reason, type=level.level)
        failure.text = _details(backend, level)
    elif level.status == "not_run" and is_missed(report, backend):
        message = f"not run, and it had to be: {reason}"
        ET.SubElement(case, "failure", message=message, type="not run").text = message
    elif level.status == "not_run":
        ET.SubElement(case, "skipped", message=reason)
    figures = describe_figures(level)
    if figures:
        ET.SubElement(case, "system-out").text = figures
    return case


def _details(backend: BackendResult, level: LevelResult) -> str:
    """What failed, line by line."""
    lines = [clean(level.reason)]
    if level.level in ("positions", "tensor"):
        lines += [each.describe() for each in backend.divergences]
    for table in tables(level):
        lines += _failed_lines(table)
    return "\n".join(lines)


def _failed_lines(table: Table) -> list[str]:
    return [
        "; ".join(f"{name}: {cell}" for name, cell in zip(table.header, row, strict=True))
        for index, row in enumerate(table.rows)
        if index in table.bad
    ]
