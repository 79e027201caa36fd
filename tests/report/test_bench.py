"""A benchmark in every format."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gap_export.report import check_writable, document_of, write_reports
from tests.benchmark.made_up import PRUNED, WHOLE, report_of, row_of


def test_speedup_and_its_ideal_are_told():
    document = document_of(report_of())
    (table,) = document.sections[1].tables
    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert cells["bundle"] == "pruned"
    assert cells["one answer"].startswith("2.4")
    assert (cells["ideal prefill"], cells["of ideal"]) == ("2.00", "121 %")
    assert ("pruned against unpruned", "2.43x") in {(t.label, t.value) for t in document.tiles}


def test_without_bars_there_is_no_verdict_and_with_them_there_is():
    assert document_of(report_of()).status is None
    assert document_of(report_of(bars={"speedup": 2.0})).status == "passed"
    failed = report_of(bars={"speedup": 3.0}, failures=("pruned: speedup 2.43, must be 3",))
    document = document_of(failed)
    assert document.status == "failed"
    assert document.sections[1].tables[0].failed == {0}


def test_every_format_is_written_and_written_again(tmp_path):
    places = {name: tmp_path / f"bench.{name}" for name in ("json", "markdown", "html")}
    report = report_of(rows=(row_of("<b>$x", WHOLE), row_of("pruned", PRUNED, unpruned=WHOLE)))
    write_reports(report, **places)
    # Each is known again as ours.
    check_writable(**places)
    page = places["html"].read_text()
    assert "&lt;b&gt;$x" in page and "<b>$x" not in page
    assert "<svg" in page
    assert places["markdown"].read_text().startswith("# gap-export bench: refshapes-llava")


def test_a_benchmark_has_no_test_cases(tmp_path):
    with pytest.raises(AssertionError, match="only a check"):
        write_reports(report_of(), junit=tmp_path / "junit.xml")


def test_the_recommended_backend_is_said():
    report = replace(report_of(), recommended={"pruned": "ort"})
    assert {t.value for t in document_of(report).tiles} >= {"--backend ort"}
