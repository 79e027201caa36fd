"""``python -m gap_export.engines build`` on a device that has a TensorRT and nothing else."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

import gap_export
from gap_export.engines.__main__ import main
from gap_export.engines.folder import read_engine_folder
from tests.engines.bundles import copy_with_fixed_cache
from tests.programs import Finished, run_program

ROOT = Path(gap_export.__file__).parent.parent
STUB = Path(__file__).parent / "stub"
# Whatever the package uses elsewhere, and a board does not bring.
BLOCKED = (
    "PIL",
    "huggingface_hub",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "pydantic",
    "rich",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "typer",
    "yaml",
)
PREAMBLE = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED!r}:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Refuse())
import gap_export.engines.build as build
from gap_export.engines.device import Gpu
build.find_gpu = lambda: Gpu(
    name="Orin", compute_capability=87, memory_bytes=64 << 30, integrated=True
)
from gap_export.engines.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def python310() -> str | None:
    folders = sorted(Path.home().glob(".pyenv/versions/3.10.*/bin/python"))
    found = [shutil.which("python3.10"), *map(str, folders)]
    for candidate in filter(None, found):
        asked = [candidate, "-c", "import sys; print(sys.version_info[:2] == (3, 10))"]
        answer = run_program(asked)
        if answer.stdout.strip() == "True":
            return candidate
    return None


@pytest.fixture(params=["this", "3.10"])
def python(request: pytest.FixtureRequest) -> str:
    if request.param == "this":
        return sys.executable
    found = python310()
    if found is None:
        pytest.skip("no Python 3.10 on this machine, which is what JetPack 6 has")
    return found


def run(python: str, *arguments: str, stub: bool = True) -> Finished:
    """The bare entry, with everything blocked that a board has not got."""
    paths = [str(ROOT), *([str(STUB)] if stub else [])]
    return run_program(
        [python, "-B", "-S", "-c", PREAMBLE, *arguments],
        env={
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            "XDG_CACHE_HOME": os.environ["XDG_CACHE_HOME"],
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONWARNINGS": "error",
        },
    )


def test_help_needs_nothing(python):
    answer = run(python, "build", "-h")
    assert (answer.returncode, answer.stderr) == (0, "")
    assert "--target" in answer.stdout


def test_a_bundle_is_read_and_built(python, trt_bundle):
    answer = run(python, "build", str(trt_bundle.path), "--target", "orin", "--batch", "1")
    assert answer.returncode == 0, answer.stderr
    assert "building decoder_model_merged" in answer.stderr
    lines = answer.stdout.splitlines()
    assert [Path(line.split()[0]).name for line in lines] == [
        f"{component}.engine"
        for component in ("vision_encoder", "text_encoder", "embed_tokens", "decoder_model_merged")
    ]
    plan = read_engine_folder(trt_bundle, "orin-sm87", verify="full").plan
    assert (plan.library_version, plan.compute_capability) == ("10.3.0", 87)
    assert plan.limits.max_batch == 1


def test_a_missing_tensorrt_is_one_line(python, trt_bundle):
    answer = run(python, "build", str(trt_bundle.path), "--target", "orin", stub=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: building engines of target orin needs a package")
    assert answer.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("BUNDLE --target jetson", "error: unknown TensorRT target: 'jetson'"),
        ("BUNDLE --target orin:sm89", "error: target orin has no such GPU generation"),
        ("NOWHERE --target orin", "error: no bundle there"),
        ("BUNDLE", "the following arguments are required: --target"),
        ("BUNDLE --target orin --workspace 0", "--workspace: 0 is out of range"),
        ("BUNDLE --target orin --weights none", "invalid choice: 'none'"),
        ("BUNDLE --target orin --batch 0", "error: no such --batch: 0"),
        ("FIXED --target orin --max-new-tokens 9", "49 slots; allowed: 48 slots together; export"),
        ("DAMAGED --target orin", "error: tokenizer.json is not what it was"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_one_message(
    trt_bundle, tiny_bundle, tmp_path, capsys, arguments, message
):
    places = {"BUNDLE": trt_bundle.path, "NOWHERE": tmp_path / "nowhere"}
    if "FIXED" in arguments:
        places["FIXED"] = copy_with_fixed_cache(tiny_bundle, tmp_path / "b", slots=48).path
    if "DAMAGED" in arguments:
        places["DAMAGED"] = trt_bundle.path
        with trt_bundle.file("tokenizer.json").open("r+b") as file:
            file.write(b"x")
    given = [str(places.get(word, word)) for word in arguments.split()]
    assert main(["build", *given]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (trt_bundle.path / "engines").exists()


def test_quiet_says_nothing_and_verbose_what_tensorrt_says(trt_bundle):
    wanted = ("build", str(trt_bundle.path), "--target", "orin", "--only", "embed_tokens")
    assert run(sys.executable, *wanted, "-q").stderr == ""
    assert "gap_export.engines.log: building" in run(sys.executable, *wanted, "-v").stderr
