"""Values inside a graph are computed from the nodes above them, with weights by reference."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gap_export.bundle import open_bundle
from gap_export.errors import BundleError, GapExportError
from gap_export.graph.onnx_file import Initializer, OnnxFile
from gap_export.parity.inside.taps import run_taps
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend

FEED = {"x": np.array([1.0, 2.0], np.float32), "unused": np.zeros(1, np.float32)}


def model(nodes, outputs, **graph):
    """A model of opset 20 with inputs x [2] and unused [1], and a constant two."""
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
        helper.make_tensor_value_info("unused", TensorProto.FLOAT, [1]),
    ]
    two = onnx.numpy_helper.from_array(np.array(2.0, np.float32), "two")
    found = helper.make_graph(
        nodes,
        "hand-made",
        inputs,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [two],
        **graph,
    )
    return helper.make_model(found, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def chain(tmp_path):
    """Twice x, then a node that nobody can run, then its result."""
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["double"], "first"),
        helper.make_node("Nothing", ["double", "unused"], ["strange"], "second", domain="nobody"),
        helper.make_node("Neg", ["strange"], ["last"], "third"),
    ]
    made = model(nodes, ["last"])
    made.opset_import.append(helper.make_opsetid("nobody", 1))
    path = tmp_path / "chain.onnx"
    path.write_bytes(made.SerializeToString())
    return OnnxFile.read(path)


def test_only_what_lies_above_a_value_is_run(chain):
    assert chain.inputs == ("x", "unused")
    assert chain.outputs == ("last",)
    part = onnx.load_from_string(chain.extract(["double"]))
    assert [node.name for node in part.graph.node] == ["first"]
    assert [value.name for value in part.graph.input] == ["x"]
    assert [value.name for value in part.graph.output] == ["double"]
    np.testing.assert_array_equal(run_taps(chain, ["double"], FEED)["double"], [2, 4])


def test_what_cannot_be_run_is_an_error_in_words(chain):
    with pytest.raises(GapExportError, match=r"cannot compute what is inside a graph: last: "):
        run_taps(chain, ["last"], FEED)


def test_inputs_and_initializers_are_values_too(chain):
    found = run_taps(chain, ["x", "two", "double"], FEED)
    assert found["x"] is FEED["x"]
    assert found["two"] == 2
    assert run_taps(chain, ["x"], FEED).keys() == {"x"}


def test_what_a_subgraph_reads_is_kept(tmp_path):
    """Both branches of an If read values of the graph by name, which its inputs do not say."""

    def branch(name, value):
        node = helper.make_node("Neg", [value], [f"{name}_result"], f"{name}_negative")
        output = helper.make_tensor_value_info(f"{name}_result", TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [output])

    nodes = [
        helper.make_node("Mul", ["x", "two"], ["double"], "double"),
        helper.make_node("ReduceSum", ["x"], ["sum"], "sum", keepdims=0),
        helper.make_node("Greater", ["sum", "two"], ["is_large"], "is_large"),
        helper.make_node(
            "If",
            ["is_large"],
            ["chosen"],
            "choose",
            then_branch=branch("then", "double"),
            else_branch=branch("else", "x"),
        ),
        helper.make_node("Identity", ["unused"], ["apart"], "apart"),
    ]
    graph = OnnxFile(model(nodes, ["chosen", "apart"]).SerializeToString(), tmp_path)
    assert graph.above(["chosen"]) == {0, 1, 2, 3}
    np.testing.assert_array_equal(run_taps(graph, ["chosen"], FEED)["chosen"], [-2, -4])


def test_initializers_are_taken_from_another_graph(tmp_path):
    nodes = [helper.make_node("Mul", ["x", "two"], ["double"], "double")]
    graph = OnnxFile(model(nodes, ["double"]).SerializeToString(), tmp_path)
    other = onnx.numpy_helper.from_array(np.array(5.0, np.float32), "two").SerializeToString()
    held = Initializer.of(memoryview(other))
    changed = graph.with_initializers({"two": held, "absent": held})
    assert changed.initializers.keys() == {"two"}
    np.testing.assert_array_equal(run_taps(changed, ["double"], FEED)["double"], [5, 10])
    np.testing.assert_array_equal(run_taps(graph, ["double"], FEED)["double"], [2, 4])


@pytest.mark.parametrize("name", [b"two", b"double", b"apart"])
def test_a_name_that_is_no_text_is_refused(tmp_path, name):
    nodes = [helper.make_node("Mul", ["x", "two"], ["double"], "apart")]
    path = tmp_path / "spoilt.onnx"
    path.write_bytes(
        model(nodes, ["double"]).SerializeToString().replace(name, name[:-1] + b"\xff")
    )
    with pytest.raises(BundleError, match=r"not an ONNX file, or cut short: .*can't decode"):
        OnnxFile.read(path)


def test_subgraphs_without_end_are_refused(tmp_path):
    def field(number, content):
        size, length = len(content), b""
        while size > 0x7F:
            length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
        return bytes([number << 3 | 2]) + length + bytes([size]) + content

    node = field(4, b"If")
    for _ in range(1200):
        # A node's attribute, whose graph has a node.
        node = field(5, field(6, field(1, node)))
    path = tmp_path / "deep.onnx"
    path.write_bytes(field(7, field(1, node)))
    with pytest.raises(BundleError, match="not an ONNX file, or cut short"):
        OnnxFile.read(path)


@pytest.mark.parametrize("content", [b"\x08", b"no protobuf"], ids=["cut", "text"])
def test_a_file_that_is_no_graph_is_refused(tmp_path, content):
    path = tmp_path / "damaged.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="not an ONNX file, or cut short"):
        OnnxFile.read(path)


def decoder_feed(length):
    rng = np.random.default_rng(0)
    feed = {
        "inputs_embeds": rng.standard_normal((1, length, 32)).astype(np.float32),
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.arange(length)[None],
        "kept_positions": 3 * np.arange(length)[None],
    }
    past = {
        f"past_key_values.{layer}.{part}": np.zeros((1, 2, 0, 8), np.float32)
        for layer in range(2)
        for part in ("key", "value")
    }
    return feed, past


@pytest.fixture
def linked(tiny_bundle, tmp_path) -> Path:
    """The tiny bundle's files as hard links, which the onnx package refuses to read."""
    for file in tiny_bundle.iterdir():
        os.link(file, tmp_path / file.name)
    return tmp_path


def test_a_bundle_s_graph_gives_what_it_gives_unchanged(tiny_bundle, linked):
    feed, past = decoder_feed(6)
    graph = OnnxFile.read(linked / "decoder_model_merged.onnx")
    before = sorted((path.name, path.stat().st_mtime_ns) for path in linked.iterdir())
    seen = run_taps(graph, ["logits", "original_position_ids", "mul_85"], feed | past)
    with OnnxRuntimeBackend(open_bundle(tiny_bundle), ["CPUExecutionProvider"]) as backend:
        expected = backend.decode(feed, backend.new_cache(1, 6))
    np.testing.assert_allclose(seen["logits"][:, -1], expected, rtol=1e-5, atol=1e-5)
    # The local function is there, and so is a value that optimizations would have fused.
    np.testing.assert_array_equal(seen["original_position_ids"], feed["kept_positions"])
    assert seen["mul_85"].shape == (6, 32)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in linked.iterdir()) == before


def test_ids_need_no_weight(tiny_bundle, tmp_path):
    """The file of weights is not even there."""
    graph = OnnxFile((tiny_bundle / "decoder_model_merged.onnx").read_bytes(), tmp_path)
    feed, past = decoder_feed(3)
    found = run_taps(graph, ["original_position_ids"], feed)
    np.testing.assert_array_equal(found["original_position_ids"], [[0, 3, 6]])
    with pytest.raises(GapExportError, match="cannot compute"):
        run_taps(graph, ["logits"], feed | past)
