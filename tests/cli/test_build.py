"""``gap-export build``: engines into a bundle, and one message where that cannot be."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from gap_export.bundle import Bundle, open_bundle
from gap_export.engines import build as build_module
from gap_export.engines.folder import read_engine_folder
from tests.engines.bundles import SKIP_RTX, copy_for_engines
from tests.programs import start_program

rtx = pytest.importorskip("tensorrt_rtx", reason=SKIP_RTX)


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    return copy_for_engines(tiny_bundle, tmp_path / "trt")


def test_engines_are_built_and_told_of(run_cli, bundle):
    answer = run_cli("build", bundle.path, "--target", "rtx:sm89", "--only", "embed_tokens")
    assert answer.code == 0, answer.err
    assert "rtx-sm89  embed_tokens" in answer.out
    assert str(bundle.path / "engines" / "rtx-sm89") in answer.out
    assert read_engine_folder(bundle, "rtx-sm89").plan.library_version == rtx.__version__


def test_json_has_one_entry_an_engine(run_cli, bundle):
    only = ("--only", "embed_tokens", "--only", "vision_encoder")
    targets = ("--target", "rtx:sm89", "--target", "rtx:sm120")
    answer = run_cli("build", bundle.path, *targets, *only, "--json", "-q")
    assert (answer.code, answer.err) == (0, "")
    assert [(e["folder"], e["component"]) for e in answer.plain] == [
        ("rtx-sm89", "vision_encoder"),
        ("rtx-sm89", "embed_tokens"),
        ("rtx-sm120", "vision_encoder"),
        ("rtx-sm120", "embed_tokens"),
    ]
    assert all(Path(e["file"]).stat().st_size == e["size_bytes"] for e in answer.plain)


def test_options_become_limits(run_cli, bundle):
    sizes = ("--max-prompt", 16, "--max-new-tokens", 4, "--batch", 1)
    more = ("--weights", "streamed", "--workspace", 64, "--optimization-level", 1)
    answer = run_cli(
        "build", bundle.path, "--target", "rtx:sm89", "--only", "embed_tokens", *sizes, *more
    )
    assert answer.code == 0, answer.err
    plan = read_engine_folder(bundle, "rtx-sm89").plan
    assert list(vars(plan.limits).values()) == [16, 4, 1, 1]
    assert plan.engines[0].weights == "streamed"


def test_too_little_memory_is_a_warning(run_cli, bundle, monkeypatch):
    monkeypatch.setattr(build_module, "free_memory", lambda: 1)
    answer = run_cli("build", bundle.path, "--target", "rtx:sm89", "--only", "embed_tokens")
    assert answer.code == 0
    assert "warning: building takes about" in answer.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "rtx", "--only", "projector"], "no such component: projector"),
        (["--target", "rtx", "--max-prompt", "100000"], "no such --max-prompt: 100000"),
    ],
)
def test_wrong_usage_is_exit_code_2_and_leaves_nothing(run_cli, bundle, arguments, message):
    answer = run_cli("build", bundle.path, *arguments)
    assert answer.code == 2
    assert message in answer.err
    assert not (bundle.path / "engines").exists()


def test_a_slip_in_the_second_target_costs_nothing_of_the_first(run_cli, bundle, monkeypatch):
    monkeypatch.setattr(build_module, "find_gpu", lambda: None)
    answer = run_cli("build", bundle.path, "--target", "rtx:sm89", "--target", "desktop")
    assert answer.code == 2
    assert "target desktop are built on the GPU they are for" in answer.err
    assert "copy the bundle to the machine that has the GPU" in answer.err
    assert not (bundle.path / "engines").exists()


def test_a_stopped_build_says_so_and_leaves_nothing(bundle):
    """A signal to the program, while TensorRT works."""
    engines = bundle.path / "engines"
    with start_program(
        [sys.executable, "-m", "gap_export", "build", bundle.path, "--target", "rtx:sm89"],
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    ) as process:
        while process.poll() is None and not list(engines.glob("*/*.engine")):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, err
    assert "error: terminated" in err
    assert not engines.exists()
    assert open_bundle(bundle.path, verify="full").manifest == bundle.manifest
