"""Traces are shared by modules that are alike in all they are made of, and by no others."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
import torch
from torch import nn

from gap_export.exporting.trace import OPSET
from gap_export.families import Component
from gap_export.spec.manifest import TensorSpec
from tests.shared import SharedFolder
from tests.shared_traces import SharedTraces


class Scale(nn.Module):
    def __init__(self, factor: float, width: int = 4) -> None:
        super().__init__()
        self.factor = factor
        self.weight = nn.Parameter(torch.ones(width, device="meta"))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values * self.weight * self.factor


def component(module: nn.Module) -> Component:
    return Component(
        name="toy",
        module=module,
        inputs=(TensorSpec(name="values", dtype="float32", shape=("rows", 4)),),
        outputs=(TensorSpec(name="out", dtype="float32", shape=("rows", 4)),),
        example_sizes={"rows": 3},
        weight_refs={},
        constants={},
    )


@pytest.fixture
def traced(tmp_path):
    """Traces, and those components that were not looked up."""
    made = []

    def really_trace(component: Component, opset: int) -> ir.Model:
        made.append(component)
        value = ir.Value(name="module.weight", type=ir.TensorType(ir.DataType.FLOAT))
        return ir.Model(ir.Graph([], [], nodes=[], initializers=[value]), ir_version=10)

    return SharedTraces(SharedFolder(tmp_path), really_trace), made


def test_what_is_alike_is_traced_once_and_each_gets_its_own(traced):
    traces, made = traced
    first, second = (traces.trace(component(Scale(2.0)), OPSET) for _ in range(2))
    assert len(made) == 1 and first is not second


@pytest.mark.parametrize(
    "other",
    [
        component(Scale(3.0)),
        component(Scale(2.0, width=1)),
        component(Scale(2.0).to(torch.float16)),
        component(nn.Sequential(Scale(2.0))),
        replace(component(Scale(2.0)), example_sizes={"rows": 2}),
    ],
)
def test_what_differs_anywhere_is_traced(traced, other):
    traces, made = traced
    traces.trace(component(Scale(2.0)), OPSET)
    traces.trace(other, OPSET)
    assert made[1:] == [other]


def test_what_may_be_other_code_under_the_same_name_is_traced_each_time(traced):
    class Local(Scale):
        pass

    foreign = Scale(2.0)
    foreign.rule = pytest.approx
    traces, made = traced
    for module in (Local(2.0), Local(2.0), foreign, foreign):
        traces.trace(component(module), OPSET)
    assert len(made) == 4
