"""Small graphs for passes to work on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from tests.shared import SharedFolder


@pytest.fixture
def small_decoder() -> Callable[..., ir.Model]:
    """Builds a stand-in decoder: two nodes read position_ids, one of them twice."""
    return build_decoder


@pytest.fixture(scope="session")
def lowering_models(shared: SharedFolder, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Every family's graphs, small, traced on demand and once in a run. Clone before changing."""
    from tests.graph.lowering_models import LoweringModels

    return LoweringModels(shared, tmp_path_factory.mktemp("lowering"))


@pytest.fixture
def run_model(tmp_path: Path) -> Callable[..., list[Any]]:
    """Saves a model, runs it in ONNX Runtime and returns its outputs."""
    import onnxruntime

    def run(model: ir.Model, **feeds: Any) -> list[Any]:
        ir.save(model, tmp_path / "model.onnx")
        session = onnxruntime.InferenceSession(
            tmp_path / "model.onnx", providers=["CPUExecutionProvider"]
        )
        return list(session.run(None, feeds))

    return run


def build_decoder(
    *,
    name: str = "position_ids",
    dtype: ir.DataType = ir.DataType.INT64,
    shape: list[Any] | None = None,
    opset: int = 20,
    read: bool = True,
) -> ir.Model:
    """``sum = 2 * ids + mask`` and ``twice = ids + ids``; ``read`` False feeds the mask instead."""
    ids = ir.Value(
        name=name,
        type=ir.TensorType(dtype),
        shape=ir.Shape(["batch", "sequence"] if shape is None else shape),
    )
    mask = ir.Value(
        name="attention_mask",
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape(["batch", "sequence"]),
    )
    source = ids if read else mask
    twice = ir.node("Add", [source, source], name="twice")
    total = ir.node("Add", [twice.outputs[0], mask], name="total")
    negative = ir.node("Neg", [source], name="negative")
    for node in (twice, total, negative):
        node.outputs[0].name = f"{node.name}_out"
        node.outputs[0].type = ir.TensorType(dtype)
        node.outputs[0].shape = ir.Shape(["batch", "sequence"])
    graph = ir.Graph(
        inputs=[ids, mask],
        outputs=[total.outputs[0], negative.outputs[0]],
        nodes=[twice, total, negative],
        opset_imports={"": opset},
        name="decoder",
    )
    return ir.Model(graph, ir_version=10)
