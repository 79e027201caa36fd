"""What the README tells people to type exists."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
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


def test_the_package_of_the_own_pruner_installs_as_printed_and_is_found(tmp_path):
    (code,) = [block for _, block in BLOCKS if block.startswith('"""my_pruners.py"""')]
    (project,) = [block for language, block in BLOCKS if language == "toml"]
    (tmp_path / "my_pruners.py").write_text(code)
    (tmp_path / "pyproject.toml").write_text(project)
    site = tmp_path / "site"
    # --no-build-isolation: hatchling is here, and no index is asked for it.
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(tmp_path)], check=True, timeout=300)
    look = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import torch\n"
        "from gap_export.pruning import VisionState, find_pruner\n"
        "features = torch.tensor([[[1.0, 0.0], [3.0, 0.1], [0.0, 1.0], [2.0, 0.0]]])\n"
        "scores = find_pruner('unusual').scores(VisionState(patch_features=features))\n"
        "print(int(scores.argmax()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", look], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout == "2\n"
