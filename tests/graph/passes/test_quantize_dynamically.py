"""Named linear layers multiply 8-bit integers; everything else stays, misfits are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from gap_export.checkpoint.weights import DerivedWeight, Int8Place, round_to_int8, store_int8
from gap_export.errors import CheckpointError
from gap_export.graph.passes.quantize_dynamically import QuantizeDynamically
from tests.graph.lowering_models import changed, check_declined, kinds, parse, run

RNG = np.random.default_rng(0)
WEIGHTS = {name: RNG.standard_normal((24, 16)).astype(np.float32) for name in ("first", "second")}
BIAS = RNG.standard_normal(24).astype(np.float32)
LAYERS = """
layers (float[rows, 16] x, float[24, 16] first, float[24, 16] second, float[24] bias)
        => (float[rows, 24] y, float[rows, 24] z) {
    y = Gemm <transB = 1> (x, first, bias)
    z = Gemm <transB = 1> (x, second)
}"""


def layers(*changes: tuple[str, str]) -> ir.Model:
    return parse(changed(LAYERS, *changes), bias=BIAS, **WEIGHTS)


def store(folder: Path, **weights: np.ndarray) -> dict[str, Int8Place]:
    derived = {
        name: DerivedWeight(
            dtype="F32",
            shape=array.shape,
            sources=(),
            compute=lambda array=array: torch.from_numpy(array.copy()),
            origin=name,
        )
        for name, array in weights.items()
    }
    return store_int8(folder / "int8.safetensors", derived, advance=lambda _: None)


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Int8Place]:
    return store(tmp_path, **WEIGHTS)


def run_beside(model: ir.Model, folder: Path, x: np.ndarray) -> tuple[list[np.ndarray], list[str]]:
    """Outputs, and the operators that ONNX Runtime makes of the graph."""
    path, kept = folder / "model.onnx", folder / "optimized.onnx"
    ir.save(model, path)
    onnx.checker.check_model(str(path))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(kept)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x})
    return found, [node.op_type for node in onnx.load(str(kept)).graph.node]


def product_of_integers(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """By hand, in float64: unsigned 8 bits from smallest to largest, zero among them."""
    values, scales = (part.numpy() for part in round_to_int8(torch.from_numpy(weight)))
    low, high = min(x.min(), 0), max(x.max(), 0)
    scale = np.float32((high - low) / np.float32(255))
    zero = np.rint(-low / scale)
    rounded = np.clip(np.rint(x / scale) + zero, 0, 255) - zero
    return (rounded.astype(np.int64) @ values.T.astype(np.int64)) * (np.float64(scale) * scales)


def test_layers_multiply_integers_and_share_what_they_read(places, tmp_path):
    x = RNG.standard_normal((5, 16)).astype(np.float32)
    floats = run(layers(), x=x)
    model = layers()
    assert QuantizeDynamically(places).run(model)
    assert kinds(model).count("DynamicQuantizeLinear") == 1
    assert kinds(model).count("MatMulInteger") == 2 and "Gemm" not in kinds(model)
    assert set(model.graph.initializers) == {
        "bias", "first.int8", "first.scales", "second.int8", "second.scales",
    }  # fmt: skip
    (y, z), fused = run_beside(model, tmp_path, x)
    np.testing.assert_allclose(y, product_of_integers(x, WEIGHTS["first"]) + BIAS, atol=1e-5)
    np.testing.assert_allclose(z, product_of_integers(x, WEIGHTS["second"]), atol=1e-5)
    # Half a step of each input, 16 times a weight of about 1, and the roundings of the weights.
    assert 0 < np.abs(y - floats[0]).max() < 0.2
    assert "MatMulInteger" not in fused and "MatMulIntegerToFloat" in fused


def test_layers_that_are_not_named_stay(places):
    model = layers()
    assert QuantizeDynamically({"first": places["first"]}).run(model)
    assert kinds(model)[-1] == "Gemm" and "second" in model.graph.initializers
    assert not QuantizeDynamically({}).run(model)


def test_a_row_of_zeros_and_the_largest_weight_are_held_exactly():
    weight = torch.tensor([[0.0, 0.0], [-3.0, 1.0]])
    values, scales = round_to_int8(weight)
    assert values.tolist() == [[0, 0], [-127, 42]]
    assert torch.equal((values * scales[:, None])[:, 0], weight[:, 0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("Gemm <transB = 1> (x, second)", "Gemm <transB = 1, alpha = 2.0> (x, second)"), "second"),
        (("Gemm <transB = 1> (x, second)", "Gemm <transB = 1> (x, first)"), "first.*not that of"),
    ],
)
def test_what_is_no_plain_layer_is_refused(places, change, message):
    check_declined(QuantizeDynamically(places), layers(change), message)


def test_a_weight_of_another_shape_is_refused(tmp_path):
    places = store(tmp_path, first=WEIGHTS["first"][:, :8])
    check_declined(QuantizeDynamically(places), layers(), "held with another shape")


def test_a_weight_that_is_not_finite_is_refused_and_leaves_no_file(tmp_path):
    bad = WEIGHTS["first"].copy()
    bad[3, 3] = np.nan
    with pytest.raises(CheckpointError, match="first"):
        store(tmp_path, first=bad)
    assert not (tmp_path / "int8.safetensors").exists()
