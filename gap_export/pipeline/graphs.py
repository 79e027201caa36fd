"""From a component to an ONNX file in the bundle: trace, passes, save."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gap_export.families import Component
from gap_export.manifest import GraphSpec
from gap_export.passes import PIPELINES, run_pipeline
from gap_export.pipeline.graph_cache import GraphCache
from gap_export.pipeline.timing import timed
from gap_export.trace import OPSET, describe_interface, save_graph, trace_component
from gap_export.weights import PlacedTensor

LOWERING = "onnxruntime"


def add_graph(
    folder: Path,
    component: Component,
    placed: Mapping[str, PlacedTensor],
    *,
    dtype: str,
    seconds: dict[str, float],
    cache: GraphCache,
) -> GraphSpec:
    """Write one component's graph into the bundle's folder.

    Args:
        folder: The bundle's.
        component: On the meta device.
        placed: For each of its weights, where the bundle holds it.
        dtype: Of its floats.
        seconds: Told how long the steps took.
        cache: Asked first, where the pruning does not matter.

    Raises:
        ExportError: tracing or a pass failed.
    """
    path = folder / f"{component.name}.onnx"
    # A graph says where its weights lie, so another place is another graph.
    key = (component.name, dtype, *component.inputs, *component.outputs, *sorted(placed.items()))
    known = None if component.prunes else cache.get(key)
    if known is not None:
        path.write_bytes(known[0])
        return known[1]
    with timed(seconds, f"trace {component.name}"):
        model = trace_component(component, placed=placed, opset=OPSET)
    with timed(seconds, f"passes {component.name}"):
        run_pipeline(model, PIPELINES[component.name])
        save_graph(model, path)
    inputs, outputs = describe_interface(model)
    spec = GraphSpec(
        component=component.name,
        lowering=LOWERING,
        dtype=dtype,
        kv_contract=component.kv_contract,
        file=path.name,
        inputs=inputs,
        outputs=outputs,
    )
    if not component.prunes:
        cache.put(key, path.read_bytes(), spec)
    return spec
