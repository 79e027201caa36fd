"""What a container does at its start, outside of one; and what hadolint says of the Dockerfiles."""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from gap_export.engines.device import Gpu
from gap_export.engines.folder import engine_folders
from gap_export.errors import UsageError
from gap_export.runtime.backends.tensorrt_loading import choose_engines
from gap_export.spec.manifest import EngineLimits
from tests.engines.bundles import SKIP_RTX, SM89, copy_for_engines
from tests.programs import run_program
from tests.runtime.backends.fake_gpu import FakeDevice
from tests.runtime.backends.fake_tensorrt import (
    FakeModule,
    copy_bundle,
    fake_library,
    write_engines,
)

FOLDER = Path(__file__).resolve().parents[2] / "tools" / "docker"
LIMITS = EngineLimits(max_prompt=24, max_new_tokens=8, max_batch=4, max_images=1)


@pytest.fixture
def start():
    """The script's functions, in a place where they can be replaced."""
    names = runpy.run_path(str(FOLDER / "start.py"))
    own = names["main"].__globals__
    return SimpleNamespace(main=names["main"], replace=own.__setitem__)


@pytest.fixture
def bundle(tiny_bundle, tmp_path):
    return copy_bundle(tiny_bundle, tmp_path / "bundle")


@pytest.fixture
def gpu(start):
    """A GPU of SM 89 and a TensorRT, both fakes; what was built is in the list."""
    built = []

    def build(bundle, choice, *, warn):
        built.append((bundle.path, choice.spec))
        shutil.rmtree(bundle.path / "engines", ignore_errors=True)
        write_engines(bundle, LIMITS)

    device = FakeDevice()
    fakes = {"open_device": lambda: device}
    fakes["import_library"] = lambda name: fake_library(FakeModule(device), name)
    found = Gpu(name="fake", compute_capability=89, memory_bytes=1 << 30, integrated=False)
    start.replace("find_gpu", lambda: found)
    start.replace("target_for", lambda capability: SM89)
    start.replace("choose_engines", partial(choose_engines, **fakes))
    start.replace("build_engines", build)
    return built


def test_without_a_gpu_onnxruntime_serves_with_a_key_of_its_own(start, bundle, tmp_path, capsys):
    start.replace("find_gpu", lambda: None)
    environment = {"GAP_EXPORT_BUNDLE": str(bundle.path)}
    command = start.main(["--threads", "2"], environment, tmp_path)
    keys = tmp_path / "keys.txt"
    assert command[1:] == [
        *("-m", "gap_export", "serve", str(bundle.path), "--host", "0.0.0.0", "--port", "8000"),
        *("--api-keys", str(keys), "--backend", "ort", "--threads", "2"),
    ]
    assert keys.stat().st_mode & 0o777 == 0o600
    said, key = capsys.readouterr().err, keys.read_text()
    assert "ONNX Runtime serves: no NVIDIA GPU" in said and key.strip() not in said
    # The next start has the same; a file of the user's goes before it.
    start.main([], environment, tmp_path)
    assert keys.read_text() == key
    assert "/run/keys" in start.main([], {**environment, "GAP_EXPORT_KEYS": "/run/keys"}, tmp_path)


def test_engines_that_are_asked_for_and_cannot_be_had_are_an_error(start, bundle, tmp_path):
    start.replace("find_gpu", lambda: None)
    environment = {"GAP_EXPORT_BUNDLE": str(bundle.path)}
    with pytest.raises(UsageError, match="no NVIDIA GPU"):
        start.main([], {**environment, "GAP_EXPORT_BACKEND": "trt"}, tmp_path)
    with pytest.raises(UsageError, match="none of the backends: gpu; allowed: auto, trt, ort"):
        start.main([], {**environment, "GAP_EXPORT_BACKEND": "gpu"}, tmp_path)


def test_engines_are_built_once_into_a_bundle_that_can_be_written(start, gpu, bundle, tmp_path):
    environment = {"GAP_EXPORT_BUNDLE": str(bundle.path)}
    for _ in range(2):
        command = start.main([], environment, tmp_path)
        assert command[command.index("--backend") + 1] == "trt"
    assert gpu == [(bundle.path, "rtx:sm89")]
    assert "ort" in start.main([], {**environment, "GAP_EXPORT_BACKEND": "ort"}, tmp_path)


def test_a_read_only_bundle_has_its_engines_in_the_cache(
    start, gpu, bundle, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(os, "access", lambda path, mode: tmp_path / "cache" in Path(path).parents)
    environment = {"GAP_EXPORT_BUNDLE": str(bundle.path)}
    places = {
        start.main([], environment, tmp_path / "cache")[4]
        for _ in range(2)
        if (tmp_path / "cache").mkdir(exist_ok=True) is None
    }
    (place,) = map(Path, places)
    assert gpu == [(place, "rtx:sm89")] and not engine_folders(bundle)
    assert place.parent == tmp_path / "cache" / "bundles"
    assert capsys.readouterr().err.count("copying it") == 1


def test_engines_of_another_card_are_built_again(start, gpu, bundle, tmp_path, capsys):
    write_engines(bundle, LIMITS, compute_capability=86)
    start.main([], {"GAP_EXPORT_BUNDLE": str(bundle.path)}, tmp_path)
    assert len(gpu) == 1 and "no use here" in capsys.readouterr().err


@pytest.mark.full
def test_a_first_start_builds_real_engines(start, tiny_text_bundle, tmp_path):
    """By TensorRT for RTX, which needs no GPU to build; to run them one is needed."""
    pytest.importorskip("tensorrt_rtx", reason=SKIP_RTX)
    bundle = copy_for_engines(tiny_text_bundle, tmp_path / "bundle")
    found = Gpu(name="fake", compute_capability=89, memory_bytes=1 << 30, integrated=False)
    start.replace("find_gpu", lambda: found)
    command = start.main([], {"GAP_EXPORT_BUNDLE": str(bundle.path)}, tmp_path)
    assert command[command.index("--backend") + 1] == "trt"
    assert engine_folders(bundle) == ("rtx-sm89",)


@pytest.mark.full
def test_hadolint_finds_nothing():
    # Beside this Python, where pip puts it.
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed: it comes with the extra full")
    done = run_program([program, *sorted(FOLDER.glob("*.Dockerfile"))])
    assert (done.returncode, done.stdout) == (0, "")
