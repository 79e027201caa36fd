"""The reader of ONNX files that needs no onnx, judged by onnx."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from gap_export.cli._onnx_reader import read_nodes
from gap_export.errors import BundleError


@pytest.fixture(scope="module")
def model():
    nodes = [
        helper.make_node("Add", ["x", "w"], ["y"], name="first"),
        helper.make_node("Clip", ["y", "", "w"], ["z"], name="second", axis=-1),
        helper.make_node("GapRemap", ["z", "x"], ["é"], name="remap", domain="gap_export"),
        helper.make_node("Identity", ["é"], ["out"]),
    ]
    weight = numpy_helper.from_array(np.ones(300, np.float32), "w")
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", 300])
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [value], [out], [weight], doc_string="d" * 200)
    return helper.make_model(graph, ir_version=10)


@pytest.fixture
def path(model, tmp_path):
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_nodes_are_what_onnx_reads(model, path):
    expected = [
        (n.name, n.op_type, n.domain, tuple(n.input), tuple(n.output)) for n in model.graph.node
    ]
    found = [(n.name, n.op_type, n.domain, n.inputs, n.outputs) for n in read_nodes(path)]
    assert found == expected


def test_a_file_cut_short_is_refused(path):
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BundleError, match="not an ONNX file, or cut short"):
        read_nodes(path)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=200))
def test_any_bytes_end_in_nodes_or_in_our_error(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("raw") / "m.onnx"
    path.write_bytes(raw)
    with contextlib.suppress(BundleError):
        assert isinstance(read_nodes(path), list)


def test_a_number_without_an_end_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(BundleError, match="longer than 10 bytes"):
        read_nodes(path)
