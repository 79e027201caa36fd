"""Modules are found in a graph by the weights they read."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from gap_export.graph.onnx_file import OnnxFile
from gap_export.parity.inside.module_taps import Tap, find_taps


def graph_of(nodes, weights, tmp_path):
    made = helper.make_graph(
        nodes,
        "hand-made",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.ones(2, np.float32), name) for name in weights],
    )
    return OnnxFile(helper.make_model(made).SerializeToString(), tmp_path)


def test_a_linear_layer_gives_what_is_behind_its_bias(tmp_path):
    """As INT4 weights are read: dequantized, multiplied, kept apart, and the bias added."""
    nodes = [
        helper.make_node("DequantizeLinear", ["a.weight.int4", "scales"], ["floats"]),
        helper.make_node("MatMul", ["x", "floats"], ["product"]),
        helper.make_node("Reshape", ["product", "size"], ["apart"]),
        helper.make_node("Add", ["apart", "a.bias"], ["biased"]),
        helper.make_node("Add", ["biased", "x"], ["y"]),
    ]
    graph = graph_of(nodes, ["a.weight.int4", "scales", "size", "a.bias"], tmp_path)
    assert find_taps(graph, ["y"]) == (
        Tap(value="x", module="a", side="input"),
        Tap(value="biased", module="a", side="output"),
        Tap(value="y", module="y", side=None),
    )


def test_a_residual_stream_is_no_bias(tmp_path):
    nodes = [
        helper.make_node("Transpose", ["a.weight"], ["turned"]),
        helper.make_node("MatMul", ["x", "turned"], ["product"]),
        helper.make_node("Add", ["product", "x"], ["y"]),
    ]
    taps = find_taps(graph_of(nodes, ["a.weight", "a.bias"], tmp_path), ["y"])
    assert [tap.value for tap in taps] == ["x", "product", "y"]


def test_what_one_module_gives_another_is_the_giver_s(tmp_path):
    """And a module that is run twice has two turns."""
    nodes = [
        helper.make_node("LayerNormalization", ["x", "norm.weight"], ["normal"]),
        helper.make_node("Gemm", ["normal", "a.weight"], ["first"]),
        helper.make_node("Gemm", ["first", "a.weight"], ["y"]),
        helper.make_node("Add", ["x", "table.weight"], ["unused"]),
    ]
    taps = find_taps(graph_of(nodes, ["norm.weight", "a.weight", "table.weight"], tmp_path), ["y"])
    assert taps == (
        Tap(value="x", module="norm", side="input"),
        Tap(value="normal", module="norm", side="output"),
        Tap(value="first", module="a", side="output"),
        Tap(value="y", module="a", side="output", turn=1),
    )
