"""Importing is free, and the command line answers with nothing but the base install."""

from __future__ import annotations

import pkgutil
import sys

import pytest

import gap_export
from tests.programs import run_program

# Anything slow, large, or from an extra. (pydantic is not here: typer itself imports it.)
HEAVY = {
    "PIL",
    "huggingface_hub",
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "polygraphy",
    "pyarrow",
    "ray",
    "safetensors",
    "tensorrt",
    "tensorrt_rtx",
    "tokenizers",
    "torch",
    "transformers",
    "yaml",
}
# Of extras that one option each asks for.
ONE_OPTION = {"grpc", "pyarrow", "ray"}
EXPORT_ONLY = {
    "onnx",
    "onnx_ir",
    "onnxscript",
    "polygraphy",
    "safetensors",
    "torch",
    "transformers",
}
# What runs a bundle, by module or package; the rest may import the export extra.
BASE_MODULES = (
    "gap_export.bundle",
    "gap_export.checkpoint.find.bundle_source",
    "gap_export.checkpoint.find.parts",
    "gap_export.cli",
    "gap_export.errors",
    "gap_export.evaluation",
    "gap_export.extras",
    "gap_export.checkpoint.find.hub_cache",
    "gap_export.spec.manifest",
    "gap_export.exporting.export",
    "gap_export.exporting.options",
    "gap_export.spec.positions",
    "gap_export.progress",
    "gap_export.spec.recipe",
    "gap_export.runtime",
    "gap_export.checkpoint.find.source",
    "gap_export.stop_signals",
)


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running some code."""
    report = "import sys; print('\\n'.join(sys.modules), file=sys.stderr)"
    answer = run_program(
        [sys.executable, "-c", f"import atexit\natexit.register(lambda: exec({report!r}))\n{code}"]
    )
    assert answer.returncode == 0, answer.stderr
    return {name.partition(".")[0] for name in answer.stderr.split()}


def all_modules() -> list[str]:
    """Every module of the package but ``__main__``, which is a program."""
    found = pkgutil.walk_packages(gap_export.__path__, "gap_export.")
    return sorted(info.name for info in found if not info.name.endswith("__main__"))


@pytest.mark.parametrize(
    "argv",
    [
        ["-h"],
        ["--version"],
        ["export", "-h"],
        ["ground", "-h"],
        ["eval", "-h"],
        ["doctor", "-h"],
        ["build", "-h"],
        ["patch", "-h"],
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(argv):
    loaded = modules_after(f"from gap_export.cli import main; main({argv!r})")
    assert "typer" in loaded
    assert loaded & (HEAVY | {"rich"}) == set()


def test_importing_the_package_costs_nothing():
    assert modules_after("import gap_export; gap_export.__version__") & HEAVY == set()


def test_modules_that_run_a_bundle_import_no_export_package():
    names = [n for n in all_modules() if n.startswith(BASE_MODULES)]
    assert len(names) > 20
    code = "\n".join(f"import {name}" for name in names)
    assert modules_after(code) & (EXPORT_ONLY | ONE_OPTION) == set()


def test_reading_a_bundle_needs_the_standard_library_and_numpy():
    wanted = (
        "gap_export.bundle",
        "gap_export.errors",
        "gap_export.spec.manifest",
        "gap_export.spec.positions",
    )
    code = "\n".join(f"import {name}" for name in all_modules() if name.startswith(wanted))
    assert modules_after(code) & (HEAVY | {"pydantic", "rich", "typer"}) == {"numpy"}


def test_importing_every_module_prints_nothing_and_leaves_the_environment_alone():
    imports = "\n".join(f"import {name}" for name in all_modules())
    # Its own import reads the switch, so it is set before; see quiet_onnxruntime.
    quiet = "before.setdefault('ORT_DISABLE_TELEMETRY', '1')"
    before = f"import os\nbefore = dict(os.environ)\n{quiet}"
    code = f"{before}\n{imports}\nassert dict(os.environ) == before, set(os.environ) ^ set(before)"
    answer = run_program([sys.executable, "-c", f"import torch, transformers.activations\n{code}"])
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "", "")
