"""Tools start, and what they publish without measuring is what the pages have."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "tools"
COMMANDS = sorted(path for path in TOOLS.glob("*.py") if '"__main__"' in path.read_text())


@pytest.fixture
def run_tool(monkeypatch, capsys):
    """Runs a tool in this process as ``tools/NAME.py`` would be; what it printed."""
    monkeypatch.syspath_prepend(str(TOOLS))
    # They set these for their own process.
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setenv("GOMP_SPINCOUNT", "0")
    before = {*sys.modules}

    def run(path: Path, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(path), run_name="__main__")
        assert not ended.value.code
        return capsys.readouterr().out

    yield run
    for name in {*sys.modules} - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(f"{TOOLS}/"):
            del sys.modules[name]


def test_there_are_tools():
    assert len(COMMANDS) > 12


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_a_tool_says_how_it_is_used(run_tool, path):
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    assert "Usage" in run_tool(path, "--help").replace("usage", "Usage")


def test_the_page_has_the_tolerances_that_check_judges_by(run_tool):
    said = run_tool(TOOLS / "tolerance_table.py").strip()
    assert said in (ROOT / "docs/results/parity.md").read_text()


def test_pages_have_the_tables_of_what_is_published(run_tool):
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    front, mark, paper = run_tool(TOOLS / "paper_table.py", "--published").partition(
        "`tools/paper_table.py"
    )
    assert front.strip() in (ROOT / "README.md").read_text()
    assert (mark + paper).strip() in (ROOT / "docs/results/paper.md").read_text()
