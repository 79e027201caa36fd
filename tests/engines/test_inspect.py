"""The network as TensorRT parsed it: its inputs and outputs, and where the GAP remap went."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from gap_export.engines.inspect import check_interface, dtype_name
from gap_export.errors import EngineError
from gap_export.spec.manifest import GraphSpec, TensorSpec
from tests.engines.bundles import SKIP_RTX
from tests.engines.gap_walk import LayerView, assert_rope_sees_remapped_ids, gap_remap_output
from tests.engines.sm89 import view_file

trt = pytest.importorskip("tensorrt_rtx", reason=SKIP_RTX)


def graph_of(bundle: Any, component: str) -> GraphSpec:
    return bundle.manifest.graph(component)


@pytest.mark.parametrize(
    "component", ["vision_encoder", "text_encoder", "embed_tokens", "decoder_model_merged"]
)
def test_inputs_and_outputs_are_the_manifests(trt_bundle, component):
    graph = graph_of(trt_bundle, component)
    interface, _ = view_file(trt_bundle.file(graph.file))
    check_interface(interface, graph)
    assert [t.name for t in interface.inputs] == [t.name for t in graph.inputs]


def test_rope_sees_remapped_ids(trt_bundle):
    graph = graph_of(trt_bundle, "decoder_model_merged")
    assert_rope_sees_remapped_ids(view_file(trt_bundle.file(graph.file))[1])


@pytest.mark.parametrize("operation", ["MIN", "ELEMENT", "SUB", "SUM"])
def test_a_decoder_without_all_of_the_remap_is_noticed(trt_bundle, operation):
    _, view = view_file(trt_bundle.file("decoder_model_merged.onnx"))
    rest = tuple(layer for layer in view.layers if layer.operation != operation)
    with pytest.raises(ValueError, match="not enough values to unpack"):
        gap_remap_output(dataclasses.replace(view, layers=rest))


def test_rope_beside_the_remap_is_noticed(trt_bundle):
    """One more layer, from the slots to an angle, is enough."""
    _, view = view_file(trt_bundle.file("decoder_model_merged.onnx"))
    angle = next(layer for layer in view.layers if layer.operation == "COS")
    bypass = LayerView(
        name="bypass", type="CAST", operation=None, inputs=("position_ids",), outputs=angle.inputs
    )
    at = view.layers.index(angle)
    wrong = dataclasses.replace(view, layers=(*view.layers[:at], bypass, *view.layers[at:]))
    with pytest.raises(AssertionError):
        assert_rope_sees_remapped_ids(wrong)


def changed(graph: GraphSpec, **changes: Any) -> GraphSpec:
    return dataclasses.replace(graph, inputs=(dataclasses.replace(graph.inputs[0], **changes),))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "ids"}, "other inputs in embed_tokens.onnx"),
        ({"dtype": "int32"}, "other input input_ids"),
        ({"shape": ("batch_size",)}, "other input input_ids"),
        ({"shape": (1, "sequence_length")}, "other input input_ids"),
    ],
)
def test_an_input_unlike_the_manifests_is_refused(trt_bundle, changes, message):
    graph = graph_of(trt_bundle, "embed_tokens")
    interface, _ = view_file(trt_bundle.file(graph.file))
    check_interface(interface, graph)
    with pytest.raises(EngineError, match=message):
        check_interface(interface, changed(graph, **changes))


def test_an_output_that_is_not_there_is_refused(trt_bundle):
    graph = graph_of(trt_bundle, "embed_tokens")
    more = (*graph.outputs, TensorSpec(name="logits", dtype="float32", shape=(1,)))
    with pytest.raises(EngineError, match=r"other outputs in embed_tokens\.onnx.*logits"):
        check_interface(
            view_file(trt_bundle.file(graph.file))[0], dataclasses.replace(graph, outputs=more)
        )


def test_dtypes_are_called_as_in_the_manifest():
    names = {name: dtype_name(value) for name, value in trt.DataType.__members__.items()}
    assert (
        names["FLOAT"] == "float32" and names["HALF"] == "float16" and names["BF16"] == "bfloat16"
    )
    assert names["INT64"] == "int64" and names["BOOL"] == "bool" and names["INT4"] == "int4"
