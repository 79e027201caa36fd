"""The Polygraphy commands that we tell people, run as far as a machine without a GPU goes."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import warnings
from pathlib import Path

import onnx
import pytest

from gap_export.bundle import open_bundle
from gap_export.engines.profiles import make_profiles
from gap_export.exporting.device_readme import compare_line
from tests.engines.bundles import SKIP_RTX, for_engines
from tests.programs import run_program

PROGRAM = Path(sys.executable).with_name("polygraphy")


@pytest.fixture(scope="module")
def bundle(tiny_text_bundle):
    return open_bundle(tiny_text_bundle)


@pytest.fixture(scope="module")
def manifest(bundle):
    return for_engines(bundle.manifest)


def run(*argv: object, cwd: Path) -> tuple[int, str]:
    """Exit code and output of a command, in this process: most of its time goes into imports."""
    tools = pytest.importorskip("polygraphy.tools", reason="it comes with the extra export")
    said = io.StringIO()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(said), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code = tools.main([str(word) for word in argv])
    return code or 0, said.getvalue()


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
    code, said = run(*on_cpu, cwd=bundle.path)
    assert (code, "PASSED" in said) == (0, True), said


def test_two_forms_of_a_graph_are_compared_on_the_same_inputs(bundle, manifest, tmp_path):
    """As the README has it: outputs of the one are saved and compared with those of the other."""
    graph = graph_of(manifest, "text_encoder")
    start = ("run", graph.file, "--onnxrt")
    drawn = ("--input-shapes", "input_ids:[2,8]", "--val-range", "input_ids:[5,40]")
    outputs = tmp_path / "out.json"
    save = ("--save-inputs", tmp_path / "in.json", "--save-outputs", outputs)
    code, said = run(*start, *drawn, "--seed", 1, *save, cwd=bundle.path)
    assert code == 0, said
    load = ("--load-inputs", tmp_path / "in.json", "--load-outputs", outputs)
    code, said = run(*start, *load, "--atol", "1e-6", cwd=bundle.path)
    assert (code, "PASSED" in said) == (0, True), said
    # Of other inputs there are other outputs.
    code, said = run(*start, *drawn, "--seed", 2, "--load-outputs", outputs, cwd=bundle.path)
    assert (code != 0, "FAILED" in said) == (True, True), said


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
    if not PROGRAM.exists():
        pytest.skip("polygraphy is not installed: it comes with the extra export")
    words = (
        PROGRAM, "convert", graph.file, "--convert-to", "trt", "-o", tmp_path / "decoder.engine",
        "--compute-capabilities", "8.9", *flags,
    )  # fmt: skip
    # Which TensorRT is used is settled as it is imported.
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    done = run_program(words, cwd=bundle.path, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Finished engine building", done.stdout)
    assert (tmp_path / "decoder.engine").stat().st_size > 1000


def test_hard_linked_weights_are_read_by_onnx_runtime_within_polygraphy(bundle, manifest, tmp_path):
    """Its onnx loaders refuse them, so the README names commands that do without."""
    for file in bundle.path.iterdir():
        os.link(file, tmp_path / file.name)
    graph = graph_of(manifest, "text_encoder")
    code, said = run(
        "run", graph.file, "--onnxrt", "--input-shapes", "input_ids:[1,8]", cwd=tmp_path
    )
    assert code == 0, said
    with pytest.raises(onnx.checker.ValidationError, match="hard links"):
        run("inspect", "model", graph.file, cwd=tmp_path)
    code, said = run("inspect", "model", graph.file, "--ignore-external-data", cwd=tmp_path)
    assert (code, "text_embeds" in said) == (0, True), said
