"""What tools/paper_table.py refuses before its hours of work, and where it keeps results."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gap_export.errors import UsageError

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def run_tool(monkeypatch, capsys, tmp_path):
    """The tool, which measures nothing: its exit code, what it said, and what it was to measure."""
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    monkeypatch.syspath_prepend(str(TOOLS))
    import paper_table

    measured = []

    def measure(name, folder, only, **options):
        measured.append((name, folder.name, *only))
        raise UsageError("nothing is measured here")

    monkeypatch.setattr(paper_table, "measure", measure)

    def run(*arguments):
        argv = ["--results", tmp_path / "results", *arguments]
        code = paper_table.run(list(map(str, argv)), command=paper_table.build_command)
        return code, capsys.readouterr().err, measured

    yield run
    for name in ("paper_table", "paper_report.words", "paper_report.plots", "paper_report.measured",
                 "paper_report", "pages"):  # fmt: skip
        sys.modules.pop(name, None)


def test_a_model_that_there_is_not_is_refused_before_the_others_are_measured(run_tool, tmp_path):
    code, said, measured = run_tool("--model", "refshapes-llava", "--model", "refshapes-lava")
    assert (code, measured) == (2, [])
    assert "no model of that name: refshapes-lava" in said
    assert not (tmp_path / "results").exists()


def test_a_place_for_results_that_is_none_is_refused(run_tool, tmp_path):
    (tmp_path / "results").touch()
    code, said, measured = run_tool("--model", "refshapes-llava")
    assert (code, measured) == (2, [])
    assert "the folder for results cannot be made" in said


def test_results_are_kept_under_a_model_s_own_name_and_errors_are_one_line(run_tool):
    code, said, measured = run_tool("--model", "demo", "--samples", 20)
    assert (code, measured) == (2, [("refshapes-llava", "refshapes-llava-20-0")])
    assert said == "error: nothing is measured here\n"


def test_some_pruners_alone_are_named_and_a_slip_is_refused(run_tool):
    code, said, measured = run_tool("--pruner", "trm")
    assert (code, measured) == (2, []) and "did you mean trim" in said
    code, _, measured = run_tool("--model", "demo", "--pruner", "trim", "--pruner", "text")
    assert measured == [("refshapes-llava", "refshapes-llava-1000-0", "trim", "text")]
