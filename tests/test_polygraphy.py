"""The Polygraphy commands that we tell people, run as far as a machine without a GPU goes."""

from __future__ import annotations

import os
import re
import shlex
import sys
from pathlib import Path

import pytest

from gap_export.bundle import open_bundle
from gap_export.engines.profiles import make_profiles
from gap_export.exporting.device_readme import compare_line
from tests.engines.bundles import SKIP_RTX, for_engines
from tests.programs import Finished, run_program

PROGRAM = Path(sys.executable).with_name("polygraphy")


@pytest.fixture(scope="module")
def bundle(tiny_text_bundle):
    return open_bundle(tiny_text_bundle)


@pytest.fixture(scope="module")
def manifest(bundle):
    return for_engines(bundle.manifest)


def run(*argv: object, cwd: Path, **environment: str) -> Finished:
    if not PROGRAM.exists():
        pytest.skip("polygraphy is not installed: it comes with the extra export")
    return run_program([PROGRAM, *map(str, argv)], cwd=cwd, env={**os.environ, **environment})


def graph_of(manifest, component: str):
    (graph,) = [g for g in manifest.graphs if (g.component, g.lowering) == (component, "portable")]
    return graph


@pytest.mark.parametrize(
    "component",
    [
        pytest.param("text_encoder", marks=pytest.mark.full),
        "vision_encoder",
        "decoder_model_merged",
    ],
)
def test_documented_comparison_runs_in_onnx_runtime(bundle, manifest, component):
    line = compare_line(manifest, graph_of(manifest, component)).replace("\\\n", " ")
    program, *argv = shlex.split(line)
    assert program == "polygraphy"
    # What is left out needs a GPU.
    on_cpu = [word for word in argv if word not in {"--trt", "--strongly-typed"}]
    done = run(*on_cpu, cwd=bundle.path)
    assert (done.returncode, "PASSED" in done.stdout) == (0, True), done.stdout + done.stderr


def test_two_forms_of_a_graph_are_compared_on_the_same_inputs(bundle, manifest, tmp_path):
    """As the README has it: outputs of the one are saved and compared with those of the other."""
    graph = graph_of(manifest, "text_encoder")
    shapes = ("--input-shapes", "input_ids:[2,8]")
    saved = run(
        "run", graph.file, "--onnxrt", *shapes, "--save-inputs", tmp_path / "in.json",
        "--save-outputs", tmp_path / "out.json", cwd=bundle.path,
    )  # fmt: skip
    assert saved.returncode == 0, saved.stdout + saved.stderr
    load = ("--load-inputs", tmp_path / "in.json", "--load-outputs", tmp_path / "out.json")
    same = run("run", graph.file, "--onnxrt", *load, "--atol", "1e-6", cwd=bundle.path)
    assert "PASSED" in same.stdout, same.stdout + same.stderr


def test_comparison_fails_where_the_outputs_differ(bundle, manifest, tmp_path):
    graph = graph_of(manifest, "text_encoder")
    shapes = ("--input-shapes", "input_ids:[2,8]")
    run(
        "run", graph.file, "--onnxrt", *shapes, "--seed", 1, "--val-range", "input_ids:[5,40]",
        "--save-outputs", tmp_path / "out.json", cwd=bundle.path,
    )  # fmt: skip
    other = run(
        "run", graph.file, "--onnxrt", *shapes, "--seed", 2, "--val-range", "input_ids:[5,40]",
        "--load-outputs", tmp_path / "out.json", cwd=bundle.path,
    )  # fmt: skip
    assert other.returncode != 0
    assert "FAILED" in other.stdout


def test_documented_conversion_builds_for_a_gpu_that_is_not_here(bundle, manifest, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason=SKIP_RTX)
    graph = graph_of(manifest, "decoder_model_merged")
    flags: list[str] = []
    for profile in make_profiles(manifest, graph, manifest.engine_limits):
        for which in ("min", "opt", "max"):
            flags.append(f"--trt-{which}-shapes")
            flags += [
                f"{name}:[{','.join(map(str, getattr(three, which)))}]"
                for name, three in profile.shapes.items()
            ]
    done = run(
        "convert", graph.file, "--convert-to", "trt", "-o", tmp_path / "decoder.engine",
        "--compute-capabilities", "8.9", *flags, cwd=bundle.path, POLYGRAPHY_USE_TENSORRT_RTX="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Finished engine building", done.stdout)
    assert (tmp_path / "decoder.engine").stat().st_size > 1000


def test_hard_linked_weights_are_read_by_onnx_runtime_within_polygraphy(bundle, manifest, tmp_path):
    """Its onnx loaders refuse them, so the README names commands that do without."""
    for file in bundle.path.iterdir():
        os.link(file, tmp_path / file.name)
    graph = graph_of(manifest, "text_encoder")
    done = run("run", graph.file, "--onnxrt", "--input-shapes", "input_ids:[1,8]", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    refused = run("inspect", "model", graph.file, cwd=tmp_path)
    assert refused.returncode != 0
    shown = run("inspect", "model", graph.file, "--ignore-external-data", cwd=tmp_path)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "text_embeds" in shown.stdout
