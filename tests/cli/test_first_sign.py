"""The first sign of a command, what is refused before the heavy imports, and the time it says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from gap_export.cli._terminal import Terminal, process_started
from gap_export.patching.choose_pruner import SCORES
from gap_export.patching.options import PRUNERS
from tools.refusals import World, read_cases

# Imports that take seconds.
HEAVY = ("torch", "transformers", "onnx", "onnxscript", "tensorrt", "tensorrt_rtx", "matplotlib")
# Sections of the table of refusals: what is refused there is what was asked for, not a file.
SECTIONS = {"export", "check", "eval", "patch", "build"}
# What these ask for has to be looked into.
LATE = {
    "demo --dtype int4 --block-size 64 --out out",
    "demo --trt orin --max-prompt 5 --out out",
    "{checkpoint} --random-weights",
    "check {bundle} --level token --samples 1 --image /nowhere.png",
    "patch {foreign-empty} --keep 0.3",
    "patch {foreign-state}",
}


def run(code: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=cwd,
    )


def test_what_is_refused_is_refused_before_the_imports_that_take_seconds(tmp_path, demo_bundle):
    world = World(tmp_path, demo_bundle)
    cases = [c for c in read_cases() if c.section in SECTIONS and c.command not in LATE]
    lines = [[world.fill(word) for word in shlex.split(case.command)] for case in cases]
    code = (
        "import contextlib, io, json, sys\n"
        "from huggingface_hub import constants\n"
        "constants.HF_HUB_CACHE = '/nowhere/hub'\n"
        "from gap_export.cli import main\n"
        "for argv in json.loads(sys.argv[1]):\n"
        "    said = io.StringIO()\n"
        "    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):\n"
        "        code = main(argv)\n"
        f"    heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "    print(json.dumps([code, heavy]))\n"
    )
    answer = run(code, json.dumps(lines), cwd=tmp_path)
    found = [json.loads(line) for line in answer.stdout.splitlines()]
    assert len(found) == len(cases) > 100, answer.stderr
    wrong = [(c.command, *got) for c, got in zip(cases, found, strict=True) if got != [c.code, []]]
    assert wrong == []


@pytest.mark.parametrize("line", ["export", "check", "eval", "patch", "build", "ground", "doctor"])
def test_the_first_sign_comes_before_anything_heavy(line):
    """What is imported at the moment of the first write to stderr."""
    words = {
        "build": ["/nowhere", "--target", "rtx"],
        "ground": ["/nowhere", "picture.png", "thing"],
        "doctor": [],
    }.get(line, ["/nowhere"])
    code = (
        "import os, sys\n"
        "class Stop:\n"
        "    def write(self, text):\n"
        "        print(text, sorted({n.partition('.')[0] for n in sys.modules}), flush=True)\n"
        "        os._exit(0)\n"
        "    def flush(self): pass\n"
        "from gap_export.cli import main\n"
        "sys.stderr = Stop()\n"
        "main(sys.argv[1:])\n"
    )
    answer = run(code, line, *words)
    text, _, modules = answer.stdout.partition(" [")
    assert text.endswith("..."), answer
    loaded = set(re.findall(r"'(\w+)'", modules))
    assert "typer" in loaded
    assert loaded & {*HEAVY, "numpy", "onnxruntime", "PIL", "rich", "tokenizers", "yaml"} == set()


def test_the_time_is_that_of_the_whole_command(tmp_path, demo_bundle):
    image = tmp_path / "image.png"
    Image.new("RGB", (96, 96)).save(image)
    code = (
        "import sys, time\n"
        "time.sleep(0.7)\n"  # as the imports before our first line would take
        f"sys.argv = ['gap-export', 'ground', {str(demo_bundle)!r}, {str(image)!r}, 'the star']\n"
        "from gap_export.cli import main\n"
        "sys.exit(main())\n"
    )
    started = time.monotonic()
    answer = run(code)
    wall = time.monotonic() - started
    assert answer.returncode == 0
    (said,) = re.findall(r"^took ([0-9.]+) s in all$", answer.stderr, re.MULTILINE)
    # Behind the last line Python takes itself apart, which is for a fifth of it at most.
    assert max(0.7, 0.8 * wall - 0.2) <= float(said) <= wall + 0.1


def test_quiet_says_nothing_of_it(capsys):
    terminal = Terminal()
    terminal.quiet = True
    terminal.begin("exporting a model")
    terminal.end()
    assert capsys.readouterr() == ("", "")


def test_a_short_command_says_no_time(run_cli):
    assert "took" not in run_cli("models").err


def test_a_process_began_before_now():
    assert 0 <= time.monotonic() - process_started() < 24 * 3600


def test_the_pruners_of_patch_are_those_that_have_a_pass():
    assert set(PRUNERS) == {"spatial", "random", *SCORES}
