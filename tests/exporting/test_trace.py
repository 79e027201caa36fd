from __future__ import annotations

import dataclasses
import logging
import shutil
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import nn

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.checkpoint.weights import PlacedTensor, place_reference
from gap_export.errors import ExportError
from gap_export.exporting.trace import (
    IR_VERSION,
    OPSET,
    describe_interface,
    save_graph,
    trace_component,
)
from gap_export.families import Component, build_reference
from gap_export.graph.pipelines import PIPELINES, run_pipeline
from gap_export.spec.manifest import TensorSpec
from tests.exporting.references import reference_of
from tests.shared_traces import share_traces

PRUNERS = ("cls", "text", "random", "spatial", "fastervlm")
ATOL = 5e-5


def spec(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def meta_component(graphs: Any, name: str, *args: Any) -> tuple[Component, dict[str, Any]]:
    """A component on meta, and its weights in the checkpoint's files."""
    checkpoint = Checkpoint.of(graphs.checkpoint)
    meta = build_reference(graphs.recipe, checkpoint, graphs.pruning(*args), device="meta")
    component = meta.component(name)
    return component, placed_by_file_name(component)


def placed_by_file_name(component: Component) -> dict[str, PlacedTensor]:
    return {
        key: place_reference(ref, location_of(ref)) for key, ref in component.weight_refs.items()
    }


def location_of(ref: Any) -> str:
    return f"{ref.file.parent.name}-{ref.file.name}"


@pytest.mark.parametrize(
    ("pruner", "keep_ratio", "order"),
    [
        *((pruner, 0.3, "raster") for pruner in PRUNERS if pruner != "cls"),
        ("cls", 0.3, "score"),
        *(
            pytest.param(*choice, marks=pytest.mark.full)
            for choice in (
                ("cls", 0.3, "raster"),
                *((pruner, 1.0, "raster") for pruner in PRUNERS),
                *((pruner, 0.3, "score") for pruner in ("random", "fastervlm")),
            )
        ),
    ],
)
def test_vision_graph_equals_pytorch(tiny_graphs, pruner, keep_ratio, order):
    session = tiny_graphs.session("vision_encoder", pruner, keep_ratio, order)
    module = tiny_graphs.reference(pruner, keep_ratio, order).vision_encoder
    generator = torch.Generator().manual_seed(1)
    sizes = [(1, 1), (1, 4), (3, 3)] if pruner == "text" else [(1, 1), (3, 3)]
    for images, rows in sizes:
        feeds = {"pixel_values": torch.randn(images, 3, 32, 32, generator=generator)}
        if pruner == "text":
            feeds["text_embeds"] = torch.randn(rows, 16, generator=generator)
        with torch.inference_mode():
            features, keep, *_ = module(*feeds.values())
        found, indices, *_ = session.run(None, {k: v.numpy() for k, v in feeds.items()})
        assert indices.dtype == np.int64
        assert np.array_equal(indices, keep.numpy())
        assert np.array_equal(indices, np.sort(indices)) == (order == "raster")
        assert found.shape == (rows, len(indices[0]), 32)
        assert np.abs(found - features.numpy()).max() <= ATOL


def test_ties_fall_alike_in_graph_and_pytorch(tiny_graphs):
    """A text embedding of zeros makes all scores equal: the first K tokens stay."""
    session = tiny_graphs.session("vision_encoder", "text", 0.3)
    feeds = {
        "pixel_values": np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32),
        "text_embeds": np.zeros((2, 16), dtype=np.float32),
    }
    indices = session.run(["keep_indices"], feeds)[0]
    with torch.inference_mode():
        keep = tiny_graphs.reference("text", 0.3).vision_encoder(
            *(torch.from_numpy(feed) for feed in feeds.values())
        )[1]
    assert indices.tolist() == keep.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_text_and_embedding_graphs_equal_pytorch(tiny_graphs):
    reference = tiny_graphs.reference("text", 0.3)
    for name, rows in (
        ("text_encoder", [[1, 12, 15, 2], [1, 2, 0, 0]]),
        ("text_encoder", [[1, 12, 15, 20, 100, 11, 2]]),
        ("embed_tokens", [[1, 4, 3], [0, 124, 2]]),
    ):
        ids = torch.tensor(rows)
        with torch.inference_mode():
            wanted = reference.component(name).module(ids).numpy()
        found = tiny_graphs.session(name, "text", 0.3).run(None, {"input_ids": ids.numpy()})[0]
        assert np.abs(found - wanted).max() <= ATOL


def test_interface_is_the_declared_one(tiny_graphs):
    component, _ = meta_component(tiny_graphs, "decoder_model_merged")
    model = ir.load(tiny_graphs.path("decoder_model_merged", bare=True))
    assert describe_interface(model) == (component.inputs, component.outputs)
    assert [value.name for value in component.inputs] == [
        "inputs_embeds", "attention_mask", "position_ids",
        "past_key_values.0.key", "past_key_values.0.value",
        "past_key_values.1.key", "past_key_values.1.value",
    ]  # fmt: skip
    assert component.inputs[1] == spec(
        "attention_mask", "batch_size", "total_sequence_length", dtype="int64"
    )
    assert model.opset_imports[""] == OPSET and OPSET <= 20
    assert model.ir_version == IR_VERSION and IR_VERSION <= 10


def test_weights_are_references_and_only_constants_are_inline(tiny_graphs):
    component, placed = meta_component(tiny_graphs, "vision_encoder", "random")
    inline, places = {}, {}
    model = ir.load(tiny_graphs.path("vision_encoder", "random", bare=True))
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            places[name] = (tensor.location, tensor.offset, tensor.length)
        else:
            inline[name] = tensor.numpy()
    assert places == {
        name: (place.location, place.offset, place.length) for name, place in placed.items()
    }
    assert list(inline) == ["fixed_places"]
    kept = component.constants["fixed_places"]
    assert np.array_equal(inline["fixed_places"], kept)
    assert kept.tolist() == sorted(kept.tolist())


def test_saved_graph_is_valid_and_has_no_operator_tensorrt_refuses(tiny_graphs):
    for component in ("vision_encoder", "text_encoder", "embed_tokens", "decoder_model_merged"):
        path = tiny_graphs.path(component, "text", 0.3)
        onnx.checker.check_model(str(path), full_check=True)
        ops = {node.op_type for node in ir.load(path).graph}
        assert not ops & {"NonZero", "Compress", "SplitToSequence", "SequenceAt", "Loop", "If"}


@pytest.fixture
def nothing_looked_up(shared, monkeypatch):
    """Traces are made, whether or not another test has made the same."""
    monkeypatch.setattr("gap_export.exporting.trace._trace", share_traces(shared))


@pytest.mark.usefixtures("nothing_looked_up")
def test_tracing_twice_gives_the_same_file(tiny_graphs, tmp_path):
    for name in ("one.onnx", "two.onnx"):
        component, placed = meta_component(tiny_graphs, "embed_tokens")
        ir.save(trace_component(component, placed=placed), tmp_path / name)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


@pytest.mark.usefixtures("nothing_looked_up")
def test_logger_level_is_put_back(tiny_graphs):
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    before = logger.level
    component, placed = meta_component(tiny_graphs, "embed_tokens")
    trace_component(component, placed=placed)
    assert logger.level == before


class Fixing(nn.Module):
    """Turns a length into a number of the graph."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + torch.zeros(int(values.shape[0]), device=values.device)


class Branching(nn.Module):
    """Looks at a value, which nothing on the meta device has."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values if bool(values.sum() > 0) else -values


def toy(module: nn.Module, *, outputs: tuple[TensorSpec, ...]) -> Component:
    return Component(
        name="toy",
        module=module,
        inputs=(spec("values", "rows"),),
        outputs=outputs,
        example_sizes={"rows": 3},
        weight_refs={},
        constants={},
    )


@pytest.mark.parametrize(
    ("module", "outputs", "says"),
    [
        (Branching(), [spec("out", "rows")], "torch cannot export toy"),
        (Fixing(), [spec("out", "rows")], r"out traced to another shape: \[3\]"),
        (nn.ReLU(), [spec("out", 3)], "out traced to another shape"),
        (nn.ReLU(), [spec("out", "rows", 1)], "out traced to another shape"),
        (nn.ReLU(), [spec("out", "rows"), spec("more", "rows")], "another number of inputs or"),
    ],
)
def test_trace_that_is_not_as_declared_is_an_export_error(module, outputs, says):
    with pytest.raises(ExportError, match=says):
        trace_component(toy(module, outputs=tuple(outputs)), placed={})


def test_buffer_without_a_declared_value_is_an_export_error(tiny_graphs):
    component, placed = meta_component(tiny_graphs, "vision_encoder", "random")
    lacking = dataclasses.replace(component, constants={})
    with pytest.raises(ExportError, match="initializer without a value: fixed_places"):
        trace_component(lacking, placed=placed)


# The demo models have 144 visual tokens as well.
@pytest.mark.parametrize(
    ("grid", "pruner"), [pytest.param(12, "text", marks=pytest.mark.full), (24, "cls")]
)
def test_real_grid_sizes_equal_pytorch(make_checkpoint, tmp_path, grid, pruner):
    """144 and 576 visual tokens."""
    checkpoint = make_checkpoint(grid=grid)
    component = reference_of(checkpoint, pruner=pruner).component("vision_encoder")
    for ref in component.weight_refs.values():
        shutil.copyfile(ref.file, tmp_path / location_of(ref))
    model = trace_component(component, placed=placed_by_file_name(component))
    run_pipeline(model, PIPELINES["vision_encoder"])
    save_graph(model, tmp_path / "vision.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "vision.onnx")
    generator = torch.Generator().manual_seed(1)
    feeds = {"pixel_values": torch.randn(1, 3, 8 * grid, 8 * grid, generator=generator)}
    if pruner == "text":
        feeds["text_embeds"] = torch.randn(2, 16, generator=generator)
    encoder = reference_of(checkpoint, pruner=pruner, device="cpu").vision_encoder
    with torch.inference_mode():
        features, keep, *_ = encoder(*feeds.values())
    found, indices, *_ = session.run(None, {k: v.numpy() for k, v in feeds.items()})
    assert indices.shape[1] == {12: 43, 24: 173}[grid]
    assert np.array_equal(indices, keep.numpy())
    assert np.abs(found - features.numpy()).max() <= ATOL


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_interface_and_weights(dtype):
    module = nn.Linear(4, 3, device="meta", dtype=getattr(torch, dtype)).requires_grad_(False)
    component = dataclasses.replace(
        toy(module, outputs=(spec("out", "rows", 3, dtype=dtype),)),
        inputs=(spec("values", "rows", 4, dtype=dtype),),
        weight_refs=dict.fromkeys(module.state_dict()),
    )
    model = trace_component(component, placed=half_precision_places(dtype))
    assert describe_interface(model) == (component.inputs, component.outputs)
    for name, place in half_precision_places(dtype).items():
        tensor = model.graph.initializers[name].const_value
        assert (tensor.location, tensor.offset, tensor.length) == ("w", place.offset, place.length)
        assert tensor.dtype.numpy().name == dtype and tuple(tensor.shape) == place.shape


def half_precision_places(dtype: str) -> dict[str, PlacedTensor]:
    name = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    return {
        "weight": PlacedTensor(location="w", dtype=name, shape=(3, 4), offset=8, length=24),
        "bias": PlacedTensor(location="w", dtype=name, shape=(3,), offset=32, length=6),
    }


def test_place_of_another_dtype_than_the_module_is_a_bug():
    module = nn.Linear(4, 3, device="meta").requires_grad_(False)
    component = dataclasses.replace(
        toy(module, outputs=(spec("out", "rows", 3),)),
        inputs=(spec("values", "rows", 4),),
        weight_refs=dict.fromkeys(module.state_dict()),
    )
    with pytest.raises(AssertionError, match="was cast or cut"):
        trace_component(component, placed=half_precision_places("float16"))
