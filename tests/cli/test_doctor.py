"""``gap-export doctor``."""

from __future__ import annotations

import subprocess
from importlib import metadata
from pathlib import Path

import onnxruntime
import pytest
import tomllib

from gap_export.cli import _machine
from gap_export.engines import device, library
from gap_export.engines.device import Gpu
from gap_export.engines.library import TensorRT
from gap_export.engines.targets import TARGETS
from gap_export.errors import MissingDependencyError
from gap_export.extras import pip_install

ROOT = Path(__file__).resolve().parents[2]


def test_versions_and_providers_are_those_that_import(run_cli):
    outcome = run_cli("doctor", "--json")
    assert outcome.code == 0
    packages = outcome.plain["packages"]
    assert packages["base"]["onnxruntime"] == onnxruntime.__version__
    assert packages["export"]["torch"].startswith("2.")
    assert outcome.plain["execution_providers"] == onnxruntime.get_available_providers()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    of_users = set(extras["optional-dependencies"]) - {"all", "dev", "docs", "full"}
    assert set(packages) == {"base"} | of_users


@pytest.fixture
def versions(monkeypatch):
    """Versions of packages that differ from what is installed; None is missing."""
    changed = {}

    def find(name):
        found = changed[name] if name in changed else metadata.version(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(_machine, "version", find)
    return changed


def test_what_is_missing_is_said_with_the_way_to_get_it(run_cli, versions):
    versions |= {"onnx": None, "optimum": None}
    lines = run_cli("doctor").out.splitlines()
    assert f"export: missing: {pip_install('export')}" in lines
    assert "  onnx missing" in lines
    assert f"optimum: missing: {pip_install('optimum')}" in lines
    assert "base: installed" in lines


def test_both_onnx_runtimes_at_once_are_a_problem(run_cli, versions):
    versions["onnxruntime-gpu"] = "1.0"
    outcome = run_cli("doctor")
    assert outcome.code == 0
    assert "warning: onnxruntime and onnxruntime-gpu are both installed" in outcome.err


def test_onnxruntime_gpu_alone_is_no_problem(run_cli, versions):
    versions |= {"onnxruntime": None, "onnxruntime-gpu": "1.0"}
    assert run_cli("doctor", "--json").plain["problems"] == []


@pytest.fixture
def nvidia_smi(monkeypatch):
    """A stand-in for the program: set ``answer`` or ``error``."""

    class Program:
        answer = ""
        error: Exception | None = None

        def run(self, command, **options):
            if self.error:
                raise self.error
            return subprocess.CompletedProcess(command, 0, stdout=self.answer)

    program = Program()
    monkeypatch.setattr(_machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(_machine.subprocess, "run", program.run)
    return program


def test_gpus_are_named(nvidia_smi):
    nvidia_smi.answer = "NVIDIA RTX 4090, 580.1, 24564 MiB, 8.9\nNVIDIA T4, 580.1, 15360 MiB, 7.5\n"
    first, second = _machine._gpus()
    assert first == {
        "name": "NVIDIA RTX 4090",
        "driver_version": "580.1",
        "memory.total": "24564 MiB",
        "compute_cap": "8.9",
    }
    assert second["compute_cap"] == "7.5"


@pytest.mark.parametrize(
    "error", [subprocess.CalledProcessError(9, "x"), subprocess.TimeoutExpired("x", 1), OSError()]
)
def test_a_driver_that_does_not_answer_is_no_gpu(nvidia_smi, error):
    nvidia_smi.error = error
    assert _machine._gpus() == []


@pytest.fixture
def tensorrt(monkeypatch):
    """Sets which TensorRT packages there are, and which GPU."""

    def have(versions, gpu=None):
        def find(name, **purpose):
            if name not in versions:
                raise MissingDependencyError("not installed", seen=name)
            return TensorRT(name=name, module=None, version=versions[name])

        monkeypatch.setattr(library, "import_tensorrt", find)
        monkeypatch.setattr(device, "find_gpu", lambda: gpu)

    return have


def buildable(run_cli) -> set[str]:
    targets = run_cli("doctor", "--json").plain["tensorrt"]["targets"]
    assert set(targets) == set(TARGETS)
    return {name for name, target in targets.items() if target["builds_here"]}


def test_rtx_engines_are_built_anywhere(run_cli, tensorrt):
    tensorrt({"tensorrt_rtx": "1.7.1.116"})
    assert buildable(run_cli) == {"rtx"}
    lines = run_cli("doctor").out.splitlines()
    assert "TensorRT   tensorrt missing, tensorrt_rtx 1.7.1.116" in lines
    (orin,) = [line for line in lines if line.startswith("  orin: ")]
    assert "needs tensorrt: 10.3 (JetPack 6.2)" in orin
    assert "on the GPU the engines are for" in orin


def test_orin_engines_are_built_on_an_orin_alone(run_cli, tensorrt):
    orin = Gpu(name="Orin", compute_capability=87, memory_bytes=8 << 30, integrated=True)
    tensorrt({"tensorrt": "10.3.0"}, orin)
    assert buildable(run_cli) == {"desktop", "orin"}
    other = Gpu(name="4090", compute_capability=89, memory_bytes=24 << 30, integrated=False)
    tensorrt({"tensorrt": "10.3.0"}, other)
    assert buildable(run_cli) == {"desktop"}


@pytest.mark.parametrize("version", ["8.6.1", "10.2.0", "12.0.0"])
def test_tensorrt_of_a_version_no_target_has_builds_nothing(run_cli, tensorrt, version):
    gpu = Gpu(name="Orin", compute_capability=87, memory_bytes=8 << 30, integrated=True)
    tensorrt({"tensorrt": version}, gpu)
    assert buildable(run_cli) == set()
