"""Our own reader of ONNX files agrees with onnx, and stops where a file does."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from gap_export.errors import BundleError
from gap_export.graph.onnx_file import OnnxFile


@pytest.fixture(params=["vision_encoder", "text_encoder", "embed_tokens", "decoder_model_merged"])
def path(request: pytest.FixtureRequest, tiny_text_bundle: Path) -> Path:
    return tiny_text_bundle / f"{request.param}.onnx"


@pytest.fixture(scope="module")
def odd_model():
    """What not all exported graphs have: an input left out, a domain, a name beyond ASCII."""
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
def odd_path(odd_model, tmp_path):
    onnx.save(odd_model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_constants_are_those_onnx_sees(path):
    graph = onnx.load(path, load_external_data=False).graph
    found = OnnxFile.read(path).initializers
    assert list(found) == [tensor.name for tensor in graph.initializer]
    for tensor in graph.initializer:
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert found[tensor.name].location == entries.get("location")
        size = int(entries["length"]) if entries else len(tensor.raw_data)
        assert found[tensor.name].size == size


def test_operators_are_those_onnx_sees(path):
    model = onnx.load(path, load_external_data=False)
    nodes = [*model.graph.node, *(node for part in model.functions for node in part.node)]
    file = OnnxFile.read(path)
    found = [(node.name, node.op_type) for node in (*file.nodes, *file.function_nodes)]
    assert found == [(node.name, node.op_type) for node in nodes]


def test_nodes_are_those_onnx_sees(odd_model, odd_path):
    expected = [
        (n.name, n.op_type, n.domain, tuple(n.input), tuple(n.output)) for n in odd_model.graph.node
    ]
    found = [
        (n.name, n.op_type, n.domain, n.inputs, n.outputs) for n in OnnxFile.read(odd_path).nodes
    ]
    assert found == expected
    assert OnnxFile.read(odd_path).nodes[1].integer("axis") == -1


@pytest.mark.parametrize("kind", ["raw", "typed", "node", "ints", "int"])
def test_integers_are_read_wherever_they_stand(kind):
    numbers = np.array([3, -1, 2**40])
    held = numpy_helper.from_array(numbers, "w")
    if kind == "typed":
        held = helper.make_tensor("w", TensorProto.INT64, [3], numbers)
    given = {
        "node": {"value": held},
        "ints": {"value_ints": numbers.tolist()},
        "int": {"value_int": -1},
    }
    nodes = [helper.make_node("Constant", [], ["w"], **given[kind])] if kind in given else []
    graph = helper.make_graph(nodes, "g", [], [], [] if kind in given else [held])
    file = OnnxFile(helper.make_model(graph).SerializeToString(), Path())
    found = file.integers("w")
    assert found == ([-1] if kind == "int" else numbers.tolist())
    assert file.integers("other") is None


def test_a_file_cut_short_is_refused(odd_path):
    odd_path.write_bytes(odd_path.read_bytes()[:-40])
    with pytest.raises(BundleError, match="not an ONNX file, or cut short"):
        OnnxFile.read(odd_path)


@settings(max_examples=200, deadline=None)
@given(raw=st.binary(max_size=200))
def test_any_bytes_end_in_nodes_or_in_our_error(tmp_path_factory, raw):
    path = tmp_path_factory.mktemp("raw") / "m.onnx"
    path.write_bytes(raw)
    with suppress(BundleError):
        assert isinstance(OnnxFile.read(path), OnnxFile)


def test_a_number_without_an_end_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(BundleError, match="longer than 10 bytes"):
        OnnxFile.read(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_damaged_file_is_refused_or_read(tiny_text_bundle, tmp_path, data):
    raw = bytearray((tiny_text_bundle / "embed_tokens.onnx").read_bytes())
    end = data.draw(st.integers(0, len(raw)))
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(0, 255))
    (tmp_path / "damaged.onnx").write_bytes(raw[:end])
    # No bytes raise anything else.
    with suppress(BundleError):
        OnnxFile.read(tmp_path / "damaged.onnx")


def test_a_file_larger_than_protobuf_allows_is_not_read(tmp_path):
    with (tmp_path / "huge.onnx").open("wb") as file:
        file.truncate(1 << 31)
    with pytest.raises(BundleError, match="not an ONNX file"):
        OnnxFile.read(tmp_path / "huge.onnx")
