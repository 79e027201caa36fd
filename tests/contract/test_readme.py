"""What the README tells people to type exists."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from tests.contract.typed_commands import unknown_flags

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
LINES = [line for language, block in BLOCKS if language == "sh" for line in block.splitlines()]


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("gap-export")])
def test_commands_and_flags_exist(line):
    assert unknown_flags(line) == set()


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("tools/")])
def test_scripts_exist_and_can_be_run(line):
    script = ROOT / shlex.split(line)[0]
    assert script.stat().st_mode & 0o111


@pytest.mark.parametrize("block", [block for language, block in BLOCKS if language == "python"])
def test_python_examples_parse(block):
    assert ast.parse(block).body
