"""Named linear layers read INT4; everything else stays, and what does not fit is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from gap_export.checkpoint.weights import (
    DerivedWeight,
    QuantizedPlace,
    quantize_columns,
    store_quantized,
)
from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import fingerprint
from gap_export.graph.passes.quantize_linear import QuantizeLinear
from gap_export.graph.pipelines import run_pipeline

RNG = np.random.default_rng(0)
WIDTH = 64
WEIGHTS = {
    name: RNG.standard_normal((WIDTH, WIDTH)).astype(np.float32) for name in ("first", "second")
}
BIAS = RNG.standard_normal(WIDTH).astype(np.float32)
DTYPES = {np.float32: ir.DataType.FLOAT, np.float16: ir.DataType.FLOAT16}


def value(name: str, shape: list, dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


def layer(
    name: str, x: ir.Value, weight: ir.Value, *, bias: ir.Value | None = None, **attributes: object
) -> ir.Node:
    inputs = [x, weight] if bias is None else [x, weight, bias]
    node = ir.node("Gemm", inputs, attributes={"transB": 1, **attributes}, name=name)
    assert weight.shape is not None and x.type is not None
    node.outputs[0].name = f"{name}_out"
    node.outputs[0].type = x.type
    node.outputs[0].shape = ir.Shape(["rows", weight.shape[0]])
    return node


def two_layers(
    *, dtype: type = np.float32, bias: bool = False, opset: int = 20, **attributes: object
) -> ir.Model:
    """``y = x + second(tanh(first(x)))``: the residual makes ONNX Runtime want a Gemm."""
    kind = DTYPES[dtype]
    x = value("x", ["rows", WIDTH], kind)
    held = {name: value(f"{name}.weight", [WIDTH, WIDTH], kind) for name in WEIGHTS}
    for name, weight in held.items():
        weight.const_value = ir.tensor(WEIGHTS[name].astype(dtype), name=weight.name)
    added = None
    initializers = list(held.values())
    if bias:
        added = value("first.bias", [WIDTH], kind)
        added.const_value = ir.tensor(BIAS.astype(dtype), name=added.name)
        initializers.append(added)
    first = layer("first", x, held["first"], bias=added, **attributes)
    bent = ir.node("Tanh", [first.outputs[0]], name="bent")
    bent.outputs[0].name, bent.outputs[0].type = "bent_out", x.type
    bent.outputs[0].shape = ir.Shape(["rows", WIDTH])
    second = layer("second", bent.outputs[0], held["second"])
    total = ir.node("Add", [x, second.outputs[0]], name="total")
    y = total.outputs[0]
    y.name, y.type, y.shape = "y", x.type, ir.Shape(["rows", WIDTH])
    graph = ir.Graph(
        [x],
        [y],
        nodes=[first, bent, second, total],
        initializers=initializers,
        opset_imports={"": opset},
        name="two",
    )
    return ir.Model(graph, ir_version=10)


def floats_of(model: ir.Model, name: str) -> torch.Tensor:
    return torch.from_numpy(model.graph.initializers[name].const_value.numpy().copy())


def store(
    folder: Path, tensors: dict[str, torch.Tensor], dtypes: tuple[str, ...] = ("F32", "F16")
) -> dict[str, QuantizedPlace]:
    weights = {
        name: DerivedWeight(
            dtype="F32",
            shape=tuple(tensor.shape),
            sources=(),
            compute=lambda tensor=tensor: tensor.float(),
            origin=name,
        )
        for name, tensor in tensors.items()
    }
    return store_quantized(folder / "int4.safetensors", weights, block_size=32, dtypes=dtypes)


def dequantized(weight: torch.Tensor) -> torch.Tensor:
    steps, scales = quantize_columns(weight, block_size=32)
    return (steps * scales).reshape(weight.shape)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[np.ndarray, Counter[str]]]:
    """Runs a model beside its int4 file; the result, and what ONNX Runtime made of the graph."""

    def _run(model: ir.Model, x: np.ndarray) -> tuple[np.ndarray, Counter[str]]:
        ir.save(model, tmp_path / "model.onnx")
        onnx.checker.check_model(str(tmp_path / "model.onnx"))
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        # Computes with float activations; by default they are rounded to int8.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        session = onnxruntime.InferenceSession(
            tmp_path / "model.onnx", options, providers=["CPUExecutionProvider"]
        )
        optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
        ops = Counter(node.op_type for node in optimized.graph.node)
        return session.run(["y"], {"x": x})[0], ops

    return _run


def expected(model: ir.Model, x: np.ndarray, quantized: tuple[str, ...]) -> np.ndarray:
    first, second = (
        dequantized(floats_of(model, name)) if name in quantized else floats_of(model, name)
        for name in ("first.weight", "second.weight")
    )
    inner = torch.from_numpy(x).float() @ first.float().T
    if "first.bias" in model.graph.initializers:
        inner += floats_of(model, "first.bias").float()
    return (torch.from_numpy(x).float() + inner.tanh() @ second.float().T).numpy()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float16, 2e-3)])
def test_named_layers_compute_with_the_rounded_weights_and_nothing_dequantizes_them(
    tmp_path, run, dtype, tolerance, bias
):
    model = two_layers(dtype=dtype, bias=bias)
    names = ("first.weight", "second.weight")
    x = RNG.standard_normal((5, WIDTH)).astype(dtype)
    wanted = expected(model, x, names)
    places = store(tmp_path, {name: floats_of(model, name) for name in names})
    report = QuantizeLinear(places).run(model)
    assert report
    assert model.opset_imports[""] == 21
    kinds = Counter(node.op_type for node in model.graph)
    assert kinds["DequantizeLinear"] == kinds["MatMul"] == 2
    assert kinds["Gemm"] == 0
    assert not set(names) & set(model.graph.initializers)
    assert model.graph.outputs[0].name == "y"
    y, ops = run(model, x)
    assert ops["MatMulNBits"] == 2, ops
    assert not ops["DequantizeLinear"] + ops["Gemm"] + ops["MatMul"]
    np.testing.assert_allclose(y, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def test_layers_that_are_not_named_stay(tmp_path, run):
    model = two_layers()
    x = RNG.standard_normal((3, WIDTH)).astype(np.float32)
    wanted = expected(model, x, ("second.weight",))
    places = store(tmp_path, {"second.weight": floats_of(model, "second.weight")})
    QuantizeLinear(places).run(model)
    assert [n.name for n in model.graph if n.op_type == "Gemm"] == ["first"]
    y, _ = run(model, x)
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-4)


def test_nothing_named_is_nothing_done():
    assert not QuantizeLinear({}).run(two_layers())


def test_second_run_misses_the_weight(tmp_path):
    model = two_layers()
    places = store(tmp_path, {"first.weight": floats_of(model, "first.weight")})
    QuantizeLinear(places).run(model)
    with pytest.raises(PassError, match=r"not in the graph: first\.weight"):
        QuantizeLinear(places).run(model)


def two_readers(model: ir.Model) -> None:
    weight = model.graph.initializers["first.weight"]
    again = layer("again", model.graph.inputs[0], weight)
    model.graph.append(again)


def weight_is_output(model: ir.Model) -> None:
    model.graph.outputs.append(model.graph.initializers["first.weight"])


def weight_is_multiplied(model: ir.Model) -> None:
    (gemm,) = [node for node in model.graph if node.name == "first"]
    gemm.op_type = "MatMul"
    gemm.attributes.clear()


@pytest.mark.parametrize(
    ("attributes", "change", "said"),
    [
        ({"alpha": 0.5}, None, "read by Gemm first; allowed: the second operand of one Gemm"),
        ({"transB": 0}, None, "read by Gemm first"),
        ({"transA": 1}, None, "read by Gemm first"),
        ({}, two_readers, "read by Gemm again and Gemm first"),
        ({}, weight_is_output, "read by Gemm first"),
        ({}, weight_is_multiplied, "read by MatMul first; .*; run FuseLinear before"),
        ({"opset": 19}, None, "opset 19, IR version 10; allowed: opset >= 20"),
    ],
)
def test_what_the_pass_does_not_handle_is_refused_and_left_as_it_was(
    tmp_path, attributes, change, said
):
    model = two_layers(**attributes)
    if change is not None:
        change(model)
    names = ("first.weight", "second.weight")
    places = store(tmp_path, {name: floats_of(model, name) for name in names})
    before = fingerprint(model)
    with pytest.raises(PassError, match=said):
        QuantizeLinear(places).run(model)
    assert fingerprint(model) == before


def test_weight_of_another_shape_is_refused(tmp_path):
    model = two_layers()
    places = store(tmp_path, {"first.weight": torch.ones(WIDTH, 2 * WIDTH)})
    with pytest.raises(PassError, match=r"held with another shape: \(in, out\) = \(128, 64\)"):
        QuantizeLinear(places).run(model)


def test_scales_of_another_dtype_are_refused(tmp_path):
    model = two_layers(dtype=np.float16)
    places = store(tmp_path, {"first.weight": floats_of(model, "first.weight")}, ("F32", "BF16"))
    with pytest.raises(PassError, match=r"no scales of the dtype of first\.weight: FLOAT16"):
        QuantizeLinear(places).run(model)


@pytest.mark.parametrize(("before", "after"), [(20, 21), (21, 21), (23, 23)])
def test_opset_is_raised_only_where_it_is_too_old(tmp_path, before, after):
    model = two_layers(opset=before)
    places = store(tmp_path, {"first.weight": floats_of(model, "first.weight")})
    QuantizeLinear(places).run(model)
    assert model.opset_imports[""] == after


def test_operator_that_the_newer_opset_reads_otherwise_is_refused(tmp_path):
    model = two_layers()
    node = ir.node("GroupNormalization", [model.graph.inputs[0]] * 3, name="norm")
    model.graph.append(node)
    places = store(tmp_path, {"first.weight": floats_of(model, "first.weight")})
    with pytest.raises(PassError, match="GroupNormalization norm"):
        QuantizeLinear(places).run(model)


def test_decoder_of_an_export_holds_no_float_of_a_quantized_layer(tiny_graphs, tmp_path):
    """All 14 linear layers of the tiny decoder, of its pipeline's result; the LM head stays."""
    path = tiny_graphs.path("decoder_model_merged")
    reference = tiny_graphs.reference()
    weights = reference.component("decoder_model_merged").weight_refs
    names = [name for name in weights if name.endswith("_proj.weight")]
    places = store_quantized(
        tmp_path / "int4.safetensors",
        {name: weights[name] for name in names},
        block_size=32,
        dtypes=["F32"],
    )
    model = ir.load(path)
    run_pipeline(model, [QuantizeLinear(places)])
    assert {function.opset_imports[""] for function in model.functions.values()} == {21}
    kinds = Counter(node.op_type for node in model.graph)
    assert (kinds["DequantizeLinear"], kinds["Gemm"]) == (len(names), 1) == (14, 1)
    kept = {v.const_value.location for v in model.graph.initializers.values() if is_external(v)}
    assert "int4.safetensors" in kept


def is_external(value: ir.Value) -> bool:
    return isinstance(value.const_value, ir.ExternalTensor)
