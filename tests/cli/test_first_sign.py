"""The first sign of a command, what is refused before the heavy imports, and the time it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import pytest
from PIL import Image

from gap_export.cli._terminal import Terminal, process_started
from gap_export.patching.choose_pruner import SCORES
from gap_export.patching.options import PRUNERS
from gap_export.spec.recipe import models_dir

# Imports that take seconds.
HEAVY = ("torch", "transformers", "onnx", "onnxscript", "tensorrt", "tensorrt_rtx", "matplotlib")
TOY = "refshapes-llava"
# What is refused, and a word of the message: {taken} is a folder with a file in it, {empty} one
# without, {bundle} a bundle.
REFUSED = {
    "export TOY --keep 30": "keep ratio",
    "export TOY --keep nan": "keep ratio",
    "export TOY --keep 0.3 --out {taken}": "output folder exists",
    "export TOY --out {bundle}": "holds a bundle already",
    "export TOY --out {bundle}/sub": "would be inside a bundle",
    "export TOY --pruner nope": "no pruner of that name",
    "export TOY --pruner fastv": "not offered",
    "export refshapes-minigpt-v2 --pruner text": "cannot serve pruner text",
    "export TOY --pruner spatial --order score": "no such order",
    "export TOY --pruner cls --budget adaptive": "no such budget",
    "export TOY --pruner cls --extra-position centroid": "no extra token",
    "export TOY --seed 9223372036854775808": "seed out of range",
    "export {empty}": "checkpoint",
    "export no-such-thing-at-all": "no model of that name",
    "export {empty} --recipe no-such-recipe": "no model of that name",
    "export llava --checkpoint /nowhere": "not there",
    "export shikra-7b --checkpoint main={empty} --checkpoint nobody={empty}": "nobody",
    "export TOY --random-weights --checkpoint {empty}": "random weights",
    "export TOY --dtype float8": "float8",
    "export TOY --dtype int4 --block-size 31": "block size",
    "export TOY --block-size 32": "--block-size",
    "export TOY --trt toaster": "unknown TensorRT target",
    "export TOY --trt orin --batch 0": "--batch",
    "export TOY --trt orin --max-prompt 0": "--max-prompt",
    "export TOY --lowering fused": "--lowering",
    "eval TOY --keep 30": "keep ratio",
    "eval TOY --pruner cls,nope": "no pruner of that name",
    "eval TOY --data /nowhere": "no such data set",
    "eval TOY --data refcoco:{empty}:val": "refcoco",
    "eval TOY --protocol nope": "no such protocol",
    "eval TOY --misaligned nope": "--misaligned",
    "eval TOY --workers nope": "no such workers",
    "eval TOY --prompt none": "prompt",
    "eval TOY --html {taken}/no/such/page.html": "does not exist",
    "eval TOY --records {taken}/file": "records",
    "eval TOY --backend trt": "--backend",
    "eval TOY --dtype bfloat16": "cannot run the bundle's dtype",
    "eval TOY --min-recovered 90": "--min-recovered",
    "eval TOY --report-json {models}/refshapes-llava/config.json": "that the command reads",
    "eval {bundle} --html {models}/refshapes-llava/config.json": "that the command reads",
    "eval TOY --records {bundle}/records": "would be inside a bundle",
    "eval {bundle} --keep 0.3": "pruned already",
    "check /nowhere": "no bundle there",
    "check {bundle} --level nope": "nope",
    "check {bundle} --fail-under token": "token",
    "check {bundle} --against /nowhere": "/nowhere",
    "check {bundle} --junit {taken}/no/such.xml": "does not exist",
    "check {bundle} --record {taken} --level box": "--level",
    "check {bundle} --record {bundle}/golden": "would be inside a bundle",
    "check {bundle} --junit {models}/refshapes-llava/config.json": "that the command reads",
    "patch /nowhere": "no folder",
    "patch {export} --keep 3": "keep ratio",
    "patch {export} --pruner text": "cannot be put into",
    "patch {export} --recipe nope": "no model of that name",
    "patch {export} --out {taken}": "output folder exists",
    "build /nowhere --target rtx": "no bundle there",
    "build {bundle} --target toaster": "unknown TensorRT target",
    "ground /nowhere picture.png thing": "no bundle there",
}


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_what_is_refused_is_refused_before_the_imports_that_take_seconds(tmp_path, demo_bundle):
    places = {name: tmp_path / name for name in ("taken", "empty", "export")}
    for place in places.values():
        place.mkdir()
    (places["taken"] / "file").touch()
    for name in ("vision_encoder", "embed_tokens", "decoder_model_merged"):
        (places["export"] / f"{name}.onnx").touch()
    lines = [
        [
            word.format(**places, bundle=demo_bundle, models=models_dir()).replace("TOY", TOY)
            for word in line.split()
        ]
        for line in REFUSED
    ]
    code = (
        "import contextlib, io, json, sys\n"
        "from gap_export.cli import main\n"
        "for argv in json.loads(sys.argv[1]):\n"
        "    with contextlib.redirect_stderr(io.StringIO()) as said:\n"
        "        code = main(argv)\n"
        f"    heavy = [name for name in {HEAVY} if name in sys.modules]\n"
        "    print(json.dumps([code, said.getvalue(), heavy]))\n"
    )
    answer = run(code, json.dumps(lines))
    found = [json.loads(line) for line in answer.stdout.splitlines()]
    assert len(found) == len(lines), answer.stderr
    wrong = [
        (line, code, said, heavy)
        for (line, word), (code, said, heavy) in zip(REFUSED.items(), found, strict=True)
        if (code, heavy) != (2, []) or word not in said.splitlines()[-1]
    ]
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
