"""No instruction installs gap-export by its bare name, which anybody may take on an index."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# pip, pipx, uv pip, uv add, uv tool, poetry add, conda: and on the same line the name, as a word of
# its own. A source is a path, a file or "@ URL".
INSTALLS = re.compile(
    r"\b(pip3?|pipx|uv|poetry|conda|mamba)\b.*?\b(install|add|download|run)\b([^`#]*)"
)
RUNS = re.compile(r"\b(?:uvx|pipx\s+run)\b(?:\s+--\S+)*\s+[\"']?(gap[-_.]export)\b")
NAME = re.compile(r"""(?:^|(?<=[\s"'`]))gap[-_.]export(\[[\w,-]*\])?(?=$|[\s"'`<>=~!;),])""")
LEFT_OUT = {Path(__file__).name}


def tracked_text() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if listed.returncode != 0:
        pytest.skip("not a checkout of git")
    names = [name for name in listed.stdout.split("\0") if name and Path(name).name not in LEFT_OUT]
    return [ROOT / name for name in names if not name.endswith((".safetensors", ".png"))]


def bare_installs(text: str) -> list[str]:
    """Lines that would take gap-export from an index."""
    found = []
    for line in text.splitlines():
        arguments = [match.group(3) for match in INSTALLS.finditer(line)]
        named = [
            match
            for rest in arguments
            for match in NAME.finditer(rest)
            if not re.match(r"[\"']?\s*@\s", rest[match.end() :])
        ]
        if named or RUNS.search(line):
            found.append(line.strip())
    return found


@pytest.mark.parametrize(
    "line",
    [
        "pip install gap-export",
        'python3 -m pip install --no-deps gap-export "numpy>=1.26"',
        'pip install "gap-export[export,report]"',
        "pip install 'gap_export==0.1.0'",
        "uv pip install gap-export[export]",
        "uv add gap-export",
        "pipx install gap-export",
        "uvx gap-export models",
        "pipx run gap-export models",
    ],
)
def test_a_bare_name_is_seen(line):
    assert bare_installs(f"run: {line}") != []


@pytest.mark.parametrize(
    "line",
    [
        'pip install ".[export]"',
        'pip install "gap-export[export] @ git+https://host/x@v0.1.0"',
        'pip install "/path/to/gap-export[export]"',
        "pip install ./gap_export-0.1.0-py3-none-any.whl",
        "gap-export export toy --out gap-export",
    ],
)
def test_a_source_is_fine(line):
    assert bare_installs(line) == []


def test_no_tracked_file_installs_it_by_its_bare_name():
    found = {
        str(path.relative_to(ROOT)): lines
        for path in tracked_text()
        if (lines := bare_installs(path.read_text(encoding="utf-8", errors="replace")))
    }
    assert found == {}
