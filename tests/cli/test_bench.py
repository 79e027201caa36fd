"""``gap-export bench``, on measured rows that are made up here."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from gap_export.api import bench as api
from tests.benchmark.made_up import report_of


@pytest.fixture
def calls(monkeypatch):
    """Arguments of the benchmarks asked for; the report can be changed."""
    seen = {"report": report_of()}

    def measure(bundles, **arguments):
        seen.update(arguments, bundles=bundles)
        return seen["report"]

    monkeypatch.setattr(api, "bench", measure)
    return seen


def test_the_tables_are_printed(run_cli, calls):
    done = run_cli("bench", "whole", "pruned", "--backend", "ort", "--expressions", "4")
    assert done.code == 0
    assert (calls["expressions_per_image"], calls["backends"]) == (4, ["ort"])
    assert "pruned against unpruned: 2.43x" in done.out
    assert "GEMM rate" in done.out


def test_json_is_the_report(run_cli, calls, tmp_path):
    file = tmp_path / "bench.json"
    done = run_cli("bench", "x", "--json", "--report-json", file)
    assert done.plain == json.loads(file.read_text()) == report_of().to_plain()


def test_too_slow_is_exit_code_3_and_the_table_is_there(run_cli, calls):
    failure = "pruned: speedup 2.43, must be 3"
    calls["report"] = replace(report_of(), bars={"speedup": 3.0}, failures=(failure,))
    done = run_cli("bench", "x", "--unpruned", "y", "--fail-under", "speedup=3")
    assert (done.code, calls["fail_under"]) == (3, {"speedup": 3.0})
    assert "not as fast as asked for: pruned: speedup 2.43" in done.err
    assert "Time: milliseconds by stage" in done.out


def test_a_busy_machine_is_said_on_stderr(run_cli, calls):
    calls["report"] = replace(report_of(), warnings=("the machine is busy",))
    assert "warning: the machine is busy" in run_cli("bench", "x").err


def test_a_report_is_not_written_into_a_bundle(run_cli, calls, demo_bundle):
    done = run_cli("bench", demo_bundle, "--html", demo_bundle / "page.html")
    assert done.code == 2
    assert "bundles" not in calls
