"""ONNX files that are damaged, hostile, or not what is handled."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from gap_export.errors import UsageError
from gap_export.patching import read_graph as module
from gap_export.patching.read_graph import read_graph
from tests.patching.graphs import FLOAT, HALF, constant, model, value

X, Y = value("x", FLOAT, ["n", 4]), value("y", FLOAT, ["n", 4])


def write(path: Path, *, weight=None, nodes=None, constants=()) -> Path:
    weight = constant("w", np.eye(4, dtype=np.float32)) if weight is None else weight
    nodes = nodes or [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    onnx.save(model(nodes, [X], [Y], [weight, *constants]), path)
    return path


def external(location: str, *, offset=0, length=64, dims=(4, 4)) -> TensorProto:
    tensor = TensorProto(name="w", data_type=FLOAT, dims=dims)
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(text))
    return tensor


@pytest.fixture
def path(tmp_path: Path) -> Path:
    folder = tmp_path / "export"
    folder.mkdir()
    return folder / "vision_encoder.onnx"


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_graph(path)
    return str(caught.value)


def test_a_plain_file_is_read(path):
    graph = read_graph(write(path))
    assert (graph.dtype, graph.weight_files) == ("float32", {})


def test_most_weights_decide_the_dtype(path):
    """Constants such as a norm's epsilon stay float32 in graphs of float16."""
    half = constant("w", np.eye(4, dtype=np.float16))
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=HALF),
        helper.make_node("MatMul", ["h", "w"], ["m"]),
        helper.make_node("Cast", ["m"], ["c"], to=FLOAT),
        helper.make_node("Add", ["c", "e"], ["y"]),
    ]
    epsilon = constant("e", np.float32(1e-5))
    assert read_graph(write(path, weight=half, nodes=nodes, constants=[epsilon])).dtype == "float16"


def test_weights_in_a_file_beside_are_found_and_not_read(path, monkeypatch):
    (path.parent / "data").mkdir()
    file = path.parent / "data" / "w.bin"
    file.write_bytes(bytes(64))
    write(path, weight=external("data/w.bin"))
    monkeypatch.setattr(module.ir.ExternalTensor, "numpy", lambda self: pytest.fail("was read"))
    assert read_graph(path).weight_files == {"data/w.bin": file}


def test_a_link_to_a_file_elsewhere_is_followed(path, tmp_path):
    """Caches of the hub hold links alone."""
    (tmp_path / "blob").write_bytes(bytes(64))
    (path.parent / "w.bin").symlink_to("../blob")
    assert read_graph(write(path, weight=external("w.bin"))).weight_files


@pytest.mark.parametrize(
    "location", ["../secret", "/etc/passwd", "data/../../secret", "C:\\secret", "a\\b", "./w.bin"]
)
def test_weights_outside_of_the_folder_are_refused(path, tmp_path, location):
    (tmp_path / "secret").write_bytes(bytes(64))
    message = refusal(write(path, weight=external(location)))
    assert "weights lie outside of its folder" in message
    assert repr(location) in message


def test_a_hostile_location_in_a_branch_is_refused(path):
    node = helper.make_node("Constant", [], ["inner"], value=external("../secret"))
    branch = helper.make_graph([node], "branch", [], [value("inner", FLOAT, [4, 4])])
    flag = constant("flag", np.array(True))
    choose = helper.make_node("If", ["flag"], ["c"], then_branch=branch, else_branch=branch)
    nodes = [choose, helper.make_node("MatMul", ["x", "c"], ["p"]),
             helper.make_node("MatMul", ["p", "w"], ["y"])]  # fmt: skip
    assert "outside of its folder" in refusal(write(path, nodes=nodes, constants=[flag]))


def test_missing_weights_are_named(path):
    message = refusal(write(path, weight=external("w.bin")))
    assert "a file of weights is not there" in message
    assert str(path.parent / "w.bin") in message


@pytest.mark.parametrize(
    ("offset", "length"), [(16, 64), (0, 128), (2**62, 64), (-64, 64), (0, 32), (0, -1)]
)
def test_a_weight_outside_of_its_file_is_refused(path, offset, length):
    (path.parent / "w.bin").write_bytes(bytes(64))
    message = refusal(write(path, weight=external("w.bin", offset=offset, length=length)))
    assert "a weight lies outside of its file" in message or "damaged" in message


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[: len(raw) // 2],
        lambda raw: b"\xff" * 64,
        lambda raw: b"this is no graph at all",
        lambda raw: b"\x08\x08",
        lambda raw: raw.replace(b"MatMul", b"\xff\xfe\xfd\xfc\xfb\xfa"),
    ],
    ids=["cut", "noise", "text", "empty-model", "not-utf8"],
)
def test_a_damaged_file_is_refused(path, damage):
    raw = write(path).read_bytes()
    path.write_bytes(damage(raw))
    assert "not an ONNX file, or a damaged one" in refusal(path)


def test_every_cut_of_a_file_is_refused(path):
    """What protobuf takes for whole, since the cut lies between two fields, has no graph or opset.

    The graph is the last field but one.
    """
    raw = write(path).read_bytes()
    for length in range(1, len(raw) - 32, 7):
        path.write_bytes(raw[:length])
        assert str(path) in refusal(path)


def test_an_oversized_or_empty_file_is_refused_unread(path):
    with path.open("wb") as stream:
        os.truncate(stream.fileno(), 1 << 31)
    message = refusal(path)
    assert "not an ONNX file of sensible size" in message and "2147483648 bytes" in message
    os.truncate(path, 0)
    assert "sensible size" in refusal(path) and "0 bytes" in refusal(path)


def of_shape(*dims: int) -> TensorProto:
    """64 bytes that say to have another shape."""
    weight = constant("w", np.eye(4, dtype=np.float32))
    del weight.dims[:]
    weight.dims.extend(dims)
    return weight


make = helper.make_node
FIRST = make("MatMul", ["x", "w"], ["y"], name="first")
IN_CIRCLE = make("MatMul", ["z", "w"], ["y"], name="first")
SECOND = make("Relu", ["y"], ["z"], name="second")
DEQUANTIZED = [
    make("DequantizeLinear", ["q", "scale"], ["d"], name="dq"),
    make("MatMul", ["x", "d"], ["p"]),
    make("MatMul", ["p", "w"], ["y"]),
]
INT8 = [constant("q", np.ones((4, 4), np.int8)), constant("scale", np.float32(1))]


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"nodes": [make("MatMul", ["x", "lost"], ["y"])]}, "lost is read, and nothing gives it"),
        ({"nodes": [make("Constant", [], ["y"], value=TensorProto(name="n"))]}, "damaged one"),
        ({"nodes": DEQUANTIZED, "constants": INT8}, "quantized graphs are not handled"),
        ({"nodes": DEQUANTIZED, "constants": INT8}, "DequantizeLinear"),
        ({"nodes": [make("Identity", ["x"], ["y"])], "weight": constant("w", np.array([1]))},
         "no weights in floating point"),
        ({"nodes": [SECOND, FIRST]}, "node second reads what a node behind it gives"),
        ({"nodes": [IN_CIRCLE, SECOND]}, "node first reads what a node behind it gives"),
        ({"weight": of_shape(1 << 62, 4)}, f"w of shape {[1 << 62, 4]} has 64 bytes"),
        ({"weight": of_shape(5, 4)}, "w of shape [5, 4] has 64 bytes"),
        ({"weight": of_shape(0)}, "w of shape [0] has 64 bytes"),
    ],
)  # fmt: skip
def test_a_graph_that_does_not_hold_together_is_refused(path, parts, said):
    assert said in refusal(write(path, **parts))
