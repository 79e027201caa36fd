from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from gap_export.graph.passes.fold_constants import FoldConstants
from tests.graph.lowering_models import parse

# What torch writes for a mean: its axes are a constant sent through Reshape.
MEAN = """
g (float[rows, 4] data) => (float[rows, 1] mean) {
    axis = Constant <value = int64 {-1}> ()
    flat = Constant <value = int64[1] {-1}> ()
    axes = Reshape (axis, flat)
    mean = ReduceMean (data, axes)
}"""


def weighted(tmp_path, length: int) -> ir.Model:
    """``data * -weight`` with a weight of ``length`` numbers in a file."""
    np.arange(length, dtype=np.float32).tofile(tmp_path / "weights.bin")
    tensor = ir.ExternalTensor(
        "weights.bin", 0, 4 * length, ir.DataType.FLOAT, shape=ir.Shape([length]), name="weight",
        base_dir=str(tmp_path),
    )  # fmt: skip
    weight = ir.Value(
        name="weight", type=ir.TensorType(ir.DataType.FLOAT), shape=tensor.shape,
        const_value=tensor,
    )  # fmt: skip
    data = ir.Value(name="data", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([length]))
    negative = ir.node("Neg", [weight])
    negative.outputs[0].name = "negative"
    product = ir.node("Mul", [data, negative.outputs[0]])
    product.outputs[0].name = "product"
    product.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [data], product.outputs, nodes=[negative, product], initializers=[weight],
        opset_imports={"": 20}, name="g",
    )  # fmt: skip
    return ir.Model(graph, ir_version=10)


def test_constant_axes_become_an_initializer(run_model):
    data = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    model = parse(MEAN)
    before = run_model(model, data=data)[0]
    assert FoldConstants().run(model)
    assert [node.op_type for node in model.graph] == ["ReduceMean"]
    axes = next(iter(model.graph)).inputs[1]
    assert axes.const_value.numpy().tolist() == [-1]
    assert [value.name for value in model.graph.inputs] == ["data"]
    assert [value.name for value in model.graph.outputs] == ["mean"]
    assert np.array_equal(run_model(model, data=data)[0], before)
    assert not FoldConstants().run(model)


def test_graph_without_constants_is_reported_unmodified(small_decoder):
    assert not FoldConstants().run(small_decoder())


@pytest.mark.parametrize("length", [1, 4, 100])
def test_weight_of_any_size_is_neither_folded_nor_read(tmp_path, monkeypatch, length):
    model = weighted(tmp_path, length)

    def forbidden(self: ir.ExternalTensor) -> None:
        raise AssertionError(f"{self.name} was read")

    monkeypatch.setattr(ir.ExternalTensor, "numpy", forbidden)
    monkeypatch.setattr(ir.ExternalTensor, "tobytes", forbidden)
    assert not FoldConstants().run(model)
    assert [node.op_type for node in model.graph] == ["Neg", "Mul"]


def test_exported_reductions_have_constant_axes(tiny_graphs):
    graph = ir.load(tiny_graphs.path("decoder_model_merged")).graph
    means = [node for node in graph if node.op_type == "ReduceMean"]
    assert len(means) == 5
    assert all(node.inputs[1].const_value is not None for node in means)


def test_export_reads_no_weight(tiny_graphs, shared, tmp_path, monkeypatch):
    from gap_export.checkpoint.find.source import Checkpoint
    from gap_export.checkpoint.weights import place_reference
    from gap_export.exporting.trace import save_graph, trace_component
    from gap_export.families import build_reference
    from gap_export.graph.pipelines import PIPELINES, run_pipeline
    from tests.shared_traces import share_traces

    def forbidden(self: ir.ExternalTensor) -> None:
        raise AssertionError(f"{self.name} was read")

    monkeypatch.setattr("gap_export.exporting.trace._trace", share_traces(shared))
    monkeypatch.setattr(ir.ExternalTensor, "numpy", forbidden)
    monkeypatch.setattr(ir.ExternalTensor, "tobytes", forbidden)
    pruning = tiny_graphs.pruning("cls", 0.5)
    checkpoint = Checkpoint.of(tiny_graphs.checkpoint)
    component = build_reference(tiny_graphs.recipe, checkpoint, pruning, device="meta").component(
        "vision_encoder"
    )
    placed = {k: place_reference(ref, ref.file.name) for k, ref in component.weight_refs.items()}
    model = trace_component(component, placed=placed)
    run_pipeline(model, PIPELINES["vision_encoder"])
    save_graph(model, tmp_path / "vision_encoder.onnx")
    assert (tmp_path / "vision_encoder.onnx").stat().st_size < 200_000
