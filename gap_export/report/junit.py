"""JUnit XML of a check: a test suite for each backend, a test case for each level.

There is no standard but what readers take: https://github.com/testmoapp/junitxml. A level that was
not run is skipped; of a backend that had to be run it is a failure.
"""

from __future__ import annotations

from xml.etree import ElementTree as ET

from gap_export.parity.results import BackendResult, CheckReport, LevelResult
from gap_export.report.check import backend_title, describe_figures, is_missed, tables
from gap_export.visible import clean, visible_strings

_COUNTED = ("tests", "failures", "errors", "skipped")


def to_junit(report: CheckReport) -> str:
    """Write a report as XML, with its declaration."""
    report = visible_strings(report, show=clean)
    root = ET.Element("testsuites", name="gap-export check")
    for backend in report.backends:
        suite = ET.SubElement(root, "testsuite", name=f"gap-export check, {backend.backend}")
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
            ET.SubElement(properties, "property", name=name, value=value)
        suite.extend(_case(report, backend, level) for level in backend.levels)
        suite.set("tests", str(len(backend.levels)))
        suite.set("failures", str(len(suite.findall("testcase/failure"))))
        suite.set("errors", "0")
        suite.set("skipped", str(len(suite.findall("testcase/skipped"))))
        suite.set("time", f"{backend.seconds:.3f}")
    for name in _COUNTED:
        root.set(name, str(sum(int(suite.attrib[name]) for suite in root)))
    root.set("time", f"{sum(backend.seconds for backend in report.backends):.3f}")
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n'


def _case(report: CheckReport, backend: BackendResult, level: LevelResult) -> ET.Element:
    # A class name is cut at its dots, of which a model's name may have some.
    owner = report.model.replace(".", "_")
    case = ET.Element(
        "testcase", name=level.level, classname=f"gap-export.{owner}.{backend.backend}"
    )
    if level.status == "failed":
        failure = ET.SubElement(case, "failure", message=level.reason, type=level.level)
        lines = [level.reason]
        if level.level in ("positions", "tensor"):
            lines += [each.describe() for each in backend.divergences]
        for table in tables(level):
            for index in sorted(table.failed):
                cells = zip(table.header, table.rows[index], strict=True)
                lines.append("; ".join(f"{name}: {cell}" for name, cell in cells))
        failure.text = "\n".join(lines)
    elif level.status == "not_run" and is_missed(report, backend):
        message = f"not run, and it had to be: {level.reason}"
        ET.SubElement(case, "failure", message=message, type="not run").text = message
    elif level.status == "not_run":
        ET.SubElement(case, "skipped", message=level.reason)
    figures = describe_figures(level)
    if figures:
        ET.SubElement(case, "system-out").text = figures
    return case
