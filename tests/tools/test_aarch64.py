"""A bundle made here gives the same answers on an emulated aarch64, at the lower bounds."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from tests.programs import run_program

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return runpy.run_path(str(TOOLS / "test_aarch64.py"))


def test_lower_bounds_are_those_of_the_base_install(tool):
    bounds = tool["lower_bounds"]()
    assert "numpy==1.26" in bounds and all(bound.count("==") == 1 for bound in bounds)


def test_a_program_that_ends_otherwise_than_it_should_ends_the_tool(tool):
    do = tool["do"]
    assert do([sys.executable, "-S", "-c", "print(1)"]).stdout == "1\n"
    with pytest.raises(SystemExit, match="ended with exit code 3"):
        do([sys.executable, "-S", "-c", "raise SystemExit(3)"])
    assert do([sys.executable, "-S", "-c", "raise SystemExit(3)"], exit_code=3).returncode == 3


def test_the_table_says_what_was_refused_and_by_how_much_logits_differ(tool):
    machine = {"platform": {"machine": "aarch64"}, "python": {"version": "3.11.2"}}
    compared = [
        {"form": "base", "n": 20, "here": "ONNX Runtime 2", "there": "ONNX Runtime 1"},
        {"form": "ort", "refused": "error: too old"},
    ]
    rows = [
        {"tensor": "logits (prefill)", "max_abs_diff": 1e-5, "atol": 1e-4, "rtol": 1e-4},
        {"tensor": "image_features", "max_abs_diff": 9.0, "atol": 1e-4, "rtol": 1e-4},
    ]
    level = {"level": "tensor", "status": "passed", "reason": "", "figures": {}, "rows": rows}
    tokens = {**level, "level": "token", "figures": {"questions": 20, "equal": 20, "ties": 0}}
    report = {"backends": [{"name": "ONNX Runtime 1", "backend": "ort", "levels": [level, tokens]}]}
    page = tool["page_of"](machine, ["numpy==1.26"], compared, report, "error: no GPU")
    assert "form base | 20 of 20 answers the same" in page
    assert "form ort | refused: error: too old" in page
    assert "passed: logits differ by 1.0e-05 at most" in page
    assert "passed: 20 questions, 20 equal, 0 ties" in page


@pytest.mark.full
def test_answers_on_aarch64_are_those_of_this_machine(tmp_path):
    missing = [p for p in ("debootstrap", "qemu-aarch64-static") if not shutil.which(p)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root, debootstrap and qemu-user-static; missing: {missing}")
    command = [sys.executable, TOOLS / "test_aarch64.py", "--work", tmp_path / "aarch64"]
    done = run_program(command, seconds=3600)
    assert done.returncode == 0, done.stderr
    assert "20 of 20 answers the same, token for token" in done.stdout
