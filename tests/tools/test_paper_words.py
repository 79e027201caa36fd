"""What tools/paper_table.py says of its rows must follow from them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def words(monkeypatch):
    """The module, which lies beside the tool."""
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    monkeypatch.syspath_prepend(str(TOOLS))
    from paper_report import words as paper_words

    yield paper_words
    for name in ("paper_report.words", "paper_report.measured", "paper_report", "readme_figures"):
        sys.modules.pop(name, None)


def row(pruner: str, keep: float, positions: str, accuracy: float, *, width: float = 0.02) -> dict:
    return {
        "model": "tiny",
        "protocol": "unpad",
        "seed": 0,
        "pruner": pruner,
        "budget": "fixed",
        "keep_ratio": keep,
        "positions": positions,
        "mean_visual_tokens": 144 * keep,
        "n": 100,
        "num_images": 25,
        "acc_at_50": accuracy,
        "ci95": (accuracy - width, accuracy + width),
        "recovered": None if positions == "none" else accuracy / 0.9,
    }


def measured(compact: float, gap: float, **options):
    """One pruner at three shares, all of them alike."""
    rows = [row("none", 1.0, "none", 0.9), row("none", 1.0, "permuted", 0.05)]
    for keep in (0.5, 0.3, 0.1):
        rows += [
            row("spatial", keep, "compact", compact, **options),
            row("spatial", keep, "gap", gap, **options),
        ]
    report = {"rows": rows, "data": {"spec": "refshapes"}}
    return SimpleNamespace(
        recipe=SimpleNamespace(name="tiny", published=()),
        report=report,
        adaptive=None,
        rows=lambda: rows,
    )


def test_a_collapse_and_a_recovery_are_told(words):
    text = words.format_summary([measured(0.03, 0.88)], command="tools/paper_table.py")
    assert "at most 3.3 % of the unpruned accuracy (`spatial`; not more than a tenth)" in text
    assert "brings back 97.8 % with the best pruner" in text
    assert "90.0 % with 1 of 1 (`spatial`)" in text
    assert "do not overlap for 1 of 1 pruners" in text
    assert "GAP is ahead of compact ids in every row and column." in text
    assert "| permuted | 5.0 % | 3.0-7.0 % |" in text


def test_what_falls_short_is_told(words):
    text = words.format_summary([measured(0.4, 0.4)], command="tools/paper_table.py")
    assert "more than a tenth" in text
    assert "not more than a tenth" not in text
    assert "with 0 of 1;" in text
    assert "do not overlap for 0 of 1 pruners" in text
    assert (
        "GAP is not ahead of compact ids for `spatial` at keep 0.5, `spatial` at keep 0.3" in text
    )


def test_intervals_that_touch_overlap(words):
    text = words.format_summary([measured(0.5, 0.6, width=0.05)], command="x")
    assert "do not overlap for 0 of 1 pruners" in text


def test_the_papers_figures_stand_beside_with_their_source(words):
    text = words.format_summary([measured(0.03, 0.88)], command="x")
    (line,) = [line for line in text.splitlines() if line.startswith("| llava-1.5-7b |")]
    assert "56.1 % | 15.3 % | **51.4 %** | 27.3 % | 91.6 %" in line
    assert "arXiv 2506.21873" in line


def test_every_row_of_a_model_says_what_it_is(words):
    lines = words.format_model(measured(0.03, 0.88)).splitlines()
    assert len(lines) == 2 + 8
    assert (
        "| tiny | unpad | 0 | spatial | 0.3 | 43.2 | gap | 100 | 88.0 % | 86.0-90.0 % |"
        in (lines[-3])
    )
