"""Commands and Python of README.md and docs/: where they stand, and how they are run.

An HTML comment before a block says ``not run: REASON``, ``run: full`` for a slow one, or
``from: FILE`` for a part of a file that other tests run.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from gap_export.cli import main
from tests.contract.typed_commands import unknown_flags
from tests.programs import run_program

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What a page asks of a model is asked as often; more would show the same.
SAMPLES = "4"
_BLOCK = re.compile(
    r"(?:<!-- (?P<how>not run|run|from): (?P<why>[^>]+) -->\n)?"
    r"^```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_PROGRAMS = ("polygraphy",)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One block of code.

    Attributes:
        language: As the fence has it.
        text: Without the fence.
        line: Number of the fence's line.
        left_out: Why it is not run; empty if it is.
        source: The file that it is a part of, if it is one.
        is_slow: Whether only ``tools/test --full`` runs it.
    """

    language: str
    text: str
    line: int
    left_out: str
    source: str
    is_slow: bool

    def commands(self) -> list[str]:
        """Lines of a shell block, without comments and with continued lines joined."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [line for line in lines if line.strip() and not line.startswith("#")]


def blocks_of(page: Path) -> list[Block]:
    """All blocks of a page."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            language=match["language"],
            text=match["text"],
            line=text.count("\n", 0, match.start("language")) + 1,
            left_out=match["why"] if match["how"] == "not run" else "",
            source=match["why"] if match["how"] == "from" else "",
            is_slow=(match["how"], match["why"]) == ("run", "full"),
        )
        for match in _BLOCK.finditer(text)
    ]


def run_block(block: Block, folder: Path) -> None:
    """Run a block in ``folder``, which is the working directory."""
    if block.language == "python":
        file = folder / "snippet.py"
        file.write_text("\n" * block.line + block.text, encoding="utf-8")
        runpy.run_path(str(file))
        return
    for line in block.commands():
        program, *words = shlex.split(line, comments=True)
        if program == "gap-export":
            assert unknown_flags(line) == set(), line
            assert main(_quicker(words)) == 0, line
        else:
            assert program in _PROGRAMS, f"mark this block as not run: {line}"
            path = Path(sys.executable).with_name(program)
            if not path.exists():
                pytest.skip(f"{program} is not installed")
            done = run_program([path, *words], cwd=folder)
            assert done.returncode == 0, done.stdout + done.stderr


def _quicker(words: list[str]) -> list[str]:
    """The same command, about few expressions."""
    if words[0] not in {"check", "eval"} or {"--against", "--data", "positions"} & set(words):
        return words
    if "--samples" in words:
        place = words.index("--samples") + 1
        return [*words[:place], SAMPLES, *words[place + 1 :]]
    return [*words, "--samples", SAMPLES]
