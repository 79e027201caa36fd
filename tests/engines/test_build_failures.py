"""What stops a build is said in one message, and nothing half-written stays."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import sys
from typing import Any

import numpy as np
import pytest

from gap_export.engines import compile as compile_module
from gap_export.engines.build import build_engines
from gap_export.engines.compile import PlanFile
from gap_export.engines.folder import read_engine_folder
from gap_export.engines.log import log_of
from gap_export.errors import BundleError, EngineError, OutputError
from tests.engines.bundles import SKIP_RTX, SM89, Recorder, contents, one_node_model
from tests.programs import run_program

trt = pytest.importorskip("tensorrt_rtx", reason=SKIP_RTX)

FLOAT, INT64 = 1, 7
COMPONENT = ("embed_tokens",)


def test_an_interrupted_build_leaves_nothing(trt_bundle):
    """Ctrl+C while TensorRT works in its thread."""
    sent = []

    def interrupt() -> None:
        if not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_engines(trt_bundle, SM89, progress=Recorder(interrupt))
    assert sent == [1]
    assert not (trt_bundle.path / "engines").exists()


def test_an_interrupted_build_leaves_the_old_engines(trt_bundle):
    build_engines(trt_bundle, SM89, only=COMPONENT)
    before = contents(trt_bundle)
    # Once: a second one, as an impatient user's, would hit whatever the test does next.
    pending = [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt):
        build_engines(
            trt_bundle,
            SM89,
            progress=Recorder(lambda: pending and os.kill(os.getpid(), pending.pop())),
        )
    assert pending == []
    assert contents(trt_bundle) == before
    read_engine_folder(trt_bundle, "rtx-sm89", verify="full")


def test_an_operator_that_is_not_there_is_named_with_its_node(one_graph_bundle):
    model = one_node_model(
        "NonZero", {"x": (FLOAT, ["batch_size", 4])}, {"y": (INT64, [2, "sequence_length"])}
    )
    bundle = one_graph_bundle(model)
    with pytest.raises(
        EngineError,
        match=r"does not take operator NonZero, at node pick/NonZero_3 of embed_tokens\.onnx.*"
        r"try fused: gap-export MODEL --trt rtx --lowering fused",
    ):
        build_engines(bundle, SM89)
    assert not (bundle.path / "engines").exists()


def test_a_node_without_a_kernel_is_named_with_its_operator(one_graph_bundle):
    """TensorRT parses Attention of float32, and finds when building that it has no kernel."""
    tensor = (FLOAT, ["batch_size", 2, "sequence_length", 16])
    model = one_node_model(
        "Attention", {"q": tensor, "k": tensor, "v": tensor}, {"y": tensor}, opset=23
    )
    bundle = one_graph_bundle(model)
    with pytest.raises(
        EngineError,
        match=r"cannot build embed_tokens\.onnx, it seems at operator Attention: node "
        r"pick/Attention_3: .*no.* --lowering fused",
    ):
        build_engines(bundle, SM89)
    assert not (bundle.path / "engines").exists()


def test_a_node_that_an_error_names_is_told_with_its_operator(trt_bundle, monkeypatch):
    def fail(module: Any, *_: Any) -> bool:
        text = "Error Code 10: Could not find any implementation for node node_GatherElements_4."
        log_of(module).handle.log(module.ILogger.Severity.ERROR, text)
        return False

    monkeypatch.setattr(compile_module, "_build", fail)
    with pytest.raises(EngineError, match=r"at node node_GatherElements_4 \(GatherElements\): "):
        build_engines(trt_bundle, SM89, only=("decoder_model_merged",))


def test_weights_that_are_not_there_are_named(one_graph_bundle):
    """As a bundle that was changed after it was opened."""
    from onnx import StringStringEntryProto, TensorProto

    model = one_node_model("Add", {"x": (FLOAT, [4]), "w": (FLOAT, [4])}, {"y": (FLOAT, [4])})
    place = StringStringEntryProto(key="location", value="w.bin")
    held = TensorProto(name="w", data_type=FLOAT, dims=[4], external_data=[place])
    held.data_location = TensorProto.EXTERNAL
    model.graph.initializer.append(held)
    del model.graph.input[1]
    bundle = one_graph_bundle(model, files={"w.bin": bytes(16)})
    bundle.file("w.bin").unlink()
    with pytest.raises(EngineError, match=r"cannot read embed_tokens\.onnx.*w"):
        build_engines(bundle, SM89)


def test_a_damaged_graph_is_refused(one_graph_bundle):
    model = one_node_model("Relu", {"x": (FLOAT, [2])}, {"y": (FLOAT, [2])})
    bundle = one_graph_bundle(model)
    bundle.file("embed_tokens.onnx").write_bytes(b"\xff" * 50)
    with pytest.raises(BundleError, match="not an ONNX file"):
        build_engines(bundle, SM89)


def test_a_graph_unlike_its_manifest_is_refused(one_graph_bundle):
    model = one_node_model("Relu", {"x": (FLOAT, [2])}, {"y": (FLOAT, [2])})
    bundle = one_graph_bundle(model)
    graphs = tuple(
        dataclasses.replace(g, outputs=(dataclasses.replace(g.outputs[0], dtype="float16"),))
        for g in bundle.manifest.graphs
    )
    other = dataclasses.replace(
        bundle, manifest=dataclasses.replace(bundle.manifest, graphs=graphs)
    )
    with pytest.raises(EngineError, match=r"sees other output y.*float32 \[2\].*float16 \[2\]"):
        build_engines(other, SM89)


def test_memory_that_runs_out_is_said_so(one_graph_bundle):
    """For real: a process that may map its weights, and has no room for a copy of them."""
    from onnx import StringStringEntryProto, TensorProto

    size = 4096
    model = one_node_model(
        "MatMul",
        {"x": (FLOAT, ["batch_size", size]), "w": (FLOAT, [size, size])},
        {"y": (FLOAT, ["batch_size", size])},
    )
    weights = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    place = StringStringEntryProto(key="location", value="w.bin")
    held = TensorProto(name="w", data_type=FLOAT, dims=weights.shape, external_data=[place])
    held.data_location = TensorProto.EXTERNAL
    model.graph.initializer.append(held)
    del model.graph.input[1]
    bundle = one_graph_bundle(model, files={"w.bin": weights.tobytes()})
    code = f"""
import resource, shutil
from gap_export.bundle import open_bundle
from gap_export.engines.build import build_engines
from gap_export.engines.targets import parse_targets
from gap_export.errors import EngineError
bundle = open_bundle({str(bundle.path)!r})
choices = parse_targets(["rtx:sm89"])
# What TensorRT loads once, it has loaded after this.
shutil.rmtree(build_engines(bundle, *choices).path)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {3 * weights.nbytes // 2},) * 2)
try:
    build_engines(bundle, *choices)
except EngineError as err:
    print(err)
"""
    answer = run_program([sys.executable, "-c", code])
    assert "out of memory while building the engine of" in answer.stdout, answer.stderr
    assert "--max-prompt" in answer.stdout
    assert not list((bundle.path / "engines").iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "Unexpected exception std::bad_alloc",
        "Error Code 2: OutOfMemory (Requested size was 268435839 bytes.)",
        "[cudaDriverHelpers] CUDA error 2: out of memory",
        "cudaErrorMemoryAllocation",
    ],
)
def test_ways_to_say_that_memory_ran_out(trt_bundle, monkeypatch, text):
    def fail(module: Any, *_: Any) -> bool:
        log_of(module).handle.log(module.ILogger.Severity.ERROR, text)
        return False

    monkeypatch.setattr(compile_module, "_build", fail)
    with pytest.raises(EngineError, match="out of memory while building the engine of vision"):
        build_engines(trt_bundle, SM89)
    assert not (trt_bundle.path / "engines").exists()


def test_a_full_disk_while_a_plan_is_written_is_one_clear_error(trt_bundle, monkeypatch):
    def full(self: PlanFile, content: memoryview) -> bool:
        self.failure = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return False

    monkeypatch.setattr(PlanFile, "write", full)
    with pytest.raises(OutputError, match=r"the engines cannot be written.*No space left"):
        build_engines(trt_bundle, SM89)
    assert not (trt_bundle.path / "engines").exists()


def test_a_linked_engines_folder_is_refused(trt_bundle, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (trt_bundle.path / "engines").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OutputError, match="a link is in the way"):
        build_engines(trt_bundle, SM89)
    assert list((tmp_path / "elsewhere").iterdir()) == []
