"""README.md of a bundle that travels to a device: its commands are those of the programs."""

from __future__ import annotations

import dataclasses
import re
import shlex

import pytest

from gap_export.bundle import open_bundle
from gap_export.engines import __main__ as bare_entry
from gap_export.engines.profiles import make_profiles
from gap_export.engines.targets import TARGETS, parse_targets
from gap_export.exporting.device_readme import compare_line, device_readme, trtexec_line
from gap_export.spec.manifest import PreflightVerdict
from gap_export.version import SOURCE
from tests.engines.bundles import for_engines

(ORIN,) = parse_targets(["orin"])
BLOCKED = PreflightVerdict(
    component="vision_encoder",
    verdict="blocked",
    operators=("NonZero", "Attention"),
    reasons=("TensorRT 10.3: Attention is refused",),
)


@pytest.fixture(scope="module")
def opened(tiny_text_bundle):
    return open_bundle(tiny_text_bundle)


@pytest.fixture(scope="module")
def manifest(opened):
    made = for_engines(opened.manifest)
    targets = tuple(dataclasses.replace(t, preflight=(BLOCKED,)) for t in made.targets)
    return dataclasses.replace(made, targets=targets)


@pytest.fixture(scope="module")
def text(opened, manifest):
    return device_readme(manifest, [ORIN], folder=opened.path)


def portable(manifest):
    return [graph for graph in manifest.graphs if graph.lowering == "portable"]


def code_lines(text: str) -> list[str]:
    """Commands in the code blocks, with continued lines joined and comments gone."""
    blocks = "\n".join(re.findall(r"```\n(.*?)```", text, re.DOTALL))
    return [line.partition("   #")[0] for line in blocks.replace(" \\\n", " ").splitlines()]


def test_every_release_of_the_target_has_its_section(text):
    for platform in TARGETS["orin"].platforms:
        assert f"### {platform.name} (TensorRT " in text
    assert "Python 3.10, CUDA 12.6" in text
    assert 'cuda-python==12.*"' in text and 'cuda-python==13.*"' in text


def test_a_release_that_does_not_build_the_lowering_is_left_out(opened, manifest):
    fused = tuple(dataclasses.replace(t, lowering="fused") for t in manifest.targets)
    graphs = tuple(
        dataclasses.replace(g, lowering="fused") if g.lowering == "portable" else g
        for g in manifest.graphs
    )
    made = dataclasses.replace(manifest, targets=fused, graphs=graphs)
    text = device_readme(made, [ORIN], folder=opened.path)
    assert "### JetPack 7.2" in text
    assert "JetPack 6.2" not in text


def test_build_commands_are_those_of_the_bare_entry(text):
    builds = [line for line in code_lines(text) if "gap_export.engines" in line]
    assert len(builds) == len(TARGETS["orin"].platforms)
    for line in builds:
        program, module, entry, *argv = shlex.split(line)
        assert (program, module, entry) == ("python3", "-m", "gap_export.engines")
        options = bare_entry._parser().parse_args(argv)
        assert (str(options.bundle), options.target) == (".", ["orin"])


def test_nothing_but_numpy_and_gap_export_is_installed_to_build(text):
    before_running = text.split("Run:")[0]
    installed = re.findall(r"pip install (.*?)(?:   #|$)", before_running, re.MULTILINE)
    assert installed == ['"numpy>=1.26"', f"--no-deps {SOURCE}"]


def test_a_wheel_in_the_bundle_is_what_is_installed(opened, manifest):
    text = device_readme(manifest, [ORIN], folder=opened.path, wheel="gap_export-1-x.whl")
    installed = re.findall(r"pip install (.*?)(?:   #|$)", text, re.MULTILINE)
    assert installed[1] == "--no-deps ./gap_export-1-x.whl"
    assert installed[2] == './gap_export-1-x.whl "cuda-python==12.*"'
    assert "| `gap_export-1-x.whl` |" in text
    assert SOURCE not in text


@pytest.mark.parametrize("component", ["text_encoder", "vision_encoder", "embed_tokens"])
def test_trtexec_has_the_shapes_of_the_profile(manifest, component):
    (graph,) = [g for g in portable(manifest) if g.component == component]
    (profile,) = make_profiles(manifest, graph, manifest.engine_limits)
    flags = shlex.split(trtexec_line(manifest, graph, ORIN).replace("\\\n", " "))
    assert f"--onnx={graph.file}" in flags
    assert f"--saveEngine=engines/orin-sm87/{component}.engine" in flags
    assert "--stronglyTyped" in flags
    assert not any(flag.startswith("--profile") for flag in flags)
    for which in ("min", "opt", "max"):
        (flag,) = [f for f in flags if f.startswith(f"--{which}Shapes=")]
        assert read_shapes(flag) == {
            name: getattr(three, which) for name, three in profile.shapes.items()
        }


def test_trtexec_builds_the_decoder_with_both_profiles(manifest):
    (graph,) = [g for g in portable(manifest) if g.kv_contract == "concat"]
    profiles = make_profiles(manifest, graph, manifest.engine_limits)
    text = trtexec_line(manifest, graph, ORIN).replace("\\\n", " ")
    flags = shlex.split(text)
    assert [f for f in flags if f.startswith("--profile")] == ["--profile=0", "--profile=1"]
    # In trtexec the shapes belong to the --profile before them.
    _, *parts = text.split("--profile=")
    for part, profile in zip(parts, profiles, strict=True):
        found = [f for f in shlex.split(part) if f.startswith("--minShapes=")]
        assert read_shapes(found[0]) == {n: three.min for n, three in profile.shapes.items()}


def test_inputs_of_one_shape_are_not_given_to_trtexec(manifest):
    graph = portable(manifest)[0]
    fixed = dataclasses.replace(
        graph, inputs=(*graph.inputs, dataclasses.replace(graph.inputs[0], name="c", shape=(3, 4)))
    )
    assert "c:3x4" not in trtexec_line(manifest, fixed, ORIN)


def read_shapes(flag: str) -> dict[str, tuple[int, ...]]:
    """``--minShapes=a:1x2,b:3`` as the shapes by name."""
    pairs = (part.rsplit(":", 1) for part in flag.partition("=")[2].split(","))
    return {name: tuple(map(int, dims.split("x"))) for name, dims in pairs}


def test_verdicts_are_a_table_with_their_reasons(text):
    assert "| vision_encoder | blocked | NonZero, Attention |" in text
    assert "- vision_encoder: TensorRT 10.3: Attention is refused" in text


def test_memory_is_estimated_from_the_graphs(text, opened):
    (line,) = [line for line in text.splitlines() if line.startswith("| weights of all engines")]
    size = float(re.search(r"([\d.]+) MiB", line).group(1)) * (1 << 20)
    weights = sum(f.size for f in opened.manifest.files if f.path.endswith(".safetensors"))
    assert 0.5 * weights < size < 1.5 * weights


def test_every_graph_is_told_of(text, manifest):
    for graph in manifest.graphs:
        assert f"| `{graph.file}` | {graph.component}, {graph.lowering}" in text


def test_targets_built_anywhere_need_no_readme(opened, manifest):
    assert device_readme(manifest, parse_targets(["rtx"]), folder=opened.path) == ""


def test_a_gpu_at_hand_gets_tensorrt_from_pip(opened, manifest):
    text = device_readme(manifest, parse_targets(["desktop"]), folder=opened.path)
    assert 'pip install "tensorrt>=10.3,<10.15" "numpy>=1.26"' in text
    assert "nvidia-jetpack" not in text
    assert "--target desktop" in text


def test_comparison_names_the_inputs_with_their_usual_shapes(manifest):
    (graph,) = [g for g in portable(manifest) if g.component == "text_encoder"]
    line = compare_line(manifest, graph)
    assert line.startswith("polygraphy run text_encoder.onnx --onnxrt --trt --strongly-typed")
    assert re.search(r"--input-shapes input_ids:\[1,\d+\]$", line)
