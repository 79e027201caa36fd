"""A product with a transposed weight becomes one Gemm; everything else stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from gap_export.graph.passes.fuse_linear import FuseLinear

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((5, 3)).astype(np.float32)  # [out, in]


def linear_model(
    *,
    rank: int = 2,
    perm: tuple[int, ...] | None = (1, 0),
    weight: np.ndarray = WEIGHT,
    as_input: bool = False,
    transposed_is_output: bool = False,
    swapped: bool = False,
    opset: int = 20,
) -> ir.Model:
    """``y = x @ transpose(weight)``, or what is asked for instead."""
    lead = ["rows"] if rank == 2 else ["batch", "rows"]
    x = value("x", [*lead, weight.shape[0] if swapped else weight.shape[1]])
    w = value("w", list(weight.shape))
    if not as_input:
        w.const_value = ir.tensor(weight, name="w")
    attributes = [] if perm is None else [ir.AttrInt64s("perm", perm)]
    transpose = ir.Node("", "Transpose", [w], attributes, name="transpose")
    transpose.outputs[0].name = "wt"
    transpose.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    transpose.outputs[0].shape = ir.Shape(weight.shape[::-1])
    factors = [transpose.outputs[0], x] if swapped else [x, transpose.outputs[0]]
    matmul = ir.Node("", "MatMul", factors, name="matmul")
    y = matmul.outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    y.shape = ir.Shape([*lead, weight.shape[0]])
    outputs = [y, transpose.outputs[0]] if transposed_is_output else [y]
    graph = ir.Graph(
        [x, w] if as_input else [x],
        outputs,
        nodes=[transpose, matmul],
        initializers=[] if as_input else [w],
        opset_imports={"": opset},
        name="linear",
    )
    return ir.Model(graph, ir_version=10)


def value(name: str, shape: list) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    raw = ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(raw, providers=["CPUExecutionProvider"])
    return session.run(["y"], {"x": x})[0]


@pytest.mark.parametrize("perm", [(1, 0), None])
def test_a_linear_layer_becomes_a_gemm_with_the_same_result(perm):
    model, x = linear_model(perm=perm), RNG.standard_normal((4, 3)).astype(np.float32)
    before = run(model, x)
    report = FuseLinear().run(model)
    assert report
    assert ops(model) == ["Gemm"]
    (gemm,) = model.graph
    assert [v.name for v in gemm.inputs] == ["x", "w"]
    assert gemm.attributes["transB"].as_int() == 1
    assert model.graph.outputs[0].name == "y"
    np.testing.assert_allclose(run(model, x), before, rtol=1e-6)
    np.testing.assert_allclose(before, x @ WEIGHT.T, rtol=1e-5)


def test_a_second_run_finds_nothing():
    model = linear_model()
    FuseLinear().run(model)
    assert not FuseLinear().run(model)


def test_a_transpose_somebody_else_reads_stays():
    model = linear_model(transposed_is_output=True)
    FuseLinear().run(model)
    assert sorted(ops(model)) == ["Gemm", "Transpose"]


@pytest.mark.parametrize(
    "near_miss",
    [
        {"rank": 3},
        {"perm": (0, 1), "weight": np.ones((3, 3), np.float32)},
        {"as_input": True},
        {"swapped": True},
        {"opset": 10},
    ],
)
def test_what_is_no_such_layer_stays(near_miss):
    model = linear_model(**near_miss)
    report = FuseLinear().run(model)
    assert not report
    assert "Gemm" not in ops(model)


def test_an_x_of_unknown_rank_stays():
    model = linear_model()
    model.graph.inputs[0].shape = None
    assert not FuseLinear().run(model)


def test_no_linear_layer_of_an_export_is_left_transposed(tiny_graphs):
    for component in ("vision_encoder", "decoder_model_merged"):
        graph = ir.load(tiny_graphs.path(component)).graph
        weights = set(graph.initializers.values())
        kinds = [node.op_type for node in graph]
        assert kinds.count("Gemm") > 0
        turned = [n for n in graph if n.op_type == "Transpose" and n.inputs[0] in weights]
        assert turned == [], component
