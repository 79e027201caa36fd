"""A product with a transposed weight becomes one Gemm; everything else stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from gap_export.graph.passes.fuse_linear import FuseLinear
from tests.graph.lowering_models import changed, kinds, parse, run

RNG = np.random.default_rng(0)
WEIGHT = RNG.standard_normal((5, 3)).astype(np.float32)  # [out, in]
LINEAR = """
linear (float[rows, 3] x, float[5, 3] w) => (float[rows, 5] y) {
    wt = Transpose <perm = [1, 0]> (w)
    y = MatMul (x, wt)
}"""


def linear(*changes: tuple[str, str]) -> ir.Model:
    return parse(changed(LINEAR, *changes), w=WEIGHT)


@pytest.mark.parametrize("perm", [" <perm = [1, 0]>", ""])
def test_a_linear_layer_becomes_a_gemm_with_the_same_result(perm):
    model = linear((" <perm = [1, 0]>", perm))
    x = RNG.standard_normal((4, 3)).astype(np.float32)
    before = run(model, x=x)[0]
    assert FuseLinear().run(model)
    assert kinds(model) == ["Gemm"]
    (gemm,) = model.graph
    assert [v.name for v in gemm.inputs] == ["x", "w"]
    assert gemm.attributes["transB"].as_int() == 1
    assert model.graph.outputs[0].name == "y"
    np.testing.assert_allclose(run(model, x=x)[0], before, rtol=1e-6)
    np.testing.assert_allclose(before, x @ WEIGHT.T, rtol=1e-5)
    assert not FuseLinear().run(model)


def test_a_transpose_that_something_else_reads_stays():
    model = linear(("rows, 5] y", "rows, 5] y, float[3, 5] wt"))
    assert FuseLinear().run(model)
    assert sorted(kinds(model)) == ["Gemm", "Transpose"]


def computed_weight() -> ir.Model:
    return parse(LINEAR)


def square_weight_that_is_not_turned() -> ir.Model:
    changes = ("[1, 0]", "[0, 1]"), ("float[5, 3] w", "float[3, 3] w"), ("rows, 5]", "rows, 3]")
    return parse(changed(LINEAR, *changes), w=np.ones((3, 3), np.float32))


def old_opset() -> ir.Model:
    model = linear()
    model.opset_imports[""] = 10
    return model


def unknown_rank() -> ir.Model:
    model = linear()
    model.graph.inputs[0].shape = None
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: linear(("[rows, 3]", "[b, rows, 3]"), ("[rows, 5]", "[b, rows, 5]")),
        lambda: linear(("(x, wt)", "(wt, x)"), ("[rows, 3]", "[5, n]"), ("[rows, 5]", "[3, n]")),
        computed_weight,
        square_weight_that_is_not_turned,
        old_opset,
        unknown_rank,
    ],
)
def test_what_is_no_such_layer_stays(make):
    model = make()
    assert not FuseLinear().run(model)
    assert "Gemm" not in kinds(model)


def test_no_linear_layer_of_an_export_is_left_transposed(tiny_graphs):
    for component in ("vision_encoder", "decoder_model_merged"):
        graph = ir.load(tiny_graphs.path(component)).graph
        weights = set(graph.initializers.values())
        kinds = [node.op_type for node in graph]
        assert kinds.count("Gemm") > 0
        turned = [n for n in graph if n.op_type == "Transpose" and n.inputs[0] in weights]
        assert turned == [], component
