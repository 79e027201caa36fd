"""What TensorRT-RTX makes of graphs for a desktop GPU (SM 89), without one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import pytest

from gap_export.bundle import Bundle
from gap_export.engines.build import target_graphs
from gap_export.engines.compile import BuildPlace, view_graph
from gap_export.engines.inspect import NetworkView
from gap_export.engines.library import library_for
from gap_export.engines.log import log_of
from gap_export.spec.manifest import GraphSpec
from tests.engines.bundles import SKIP_RTX, SM89

trt = pytest.importorskip("tensorrt_rtx", reason=SKIP_RTX)

# Named dimension: smallest, usual and largest length of a profile.
Lengths = Mapping[str, tuple[int, int, int]]


def build_plan(path: Path, *profiles: Lengths) -> bytes:
    """The plan of an ONNX file, by TensorRT's own calls; the test fails with what it says."""
    log = log_of(trt)
    builder = trt.Builder(log.handle)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log.handle)
    if not parser.parse_from_file(str(path)):
        pytest.fail("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    for lengths in profiles:
        profile = builder.create_optimization_profile()
        for value in onnx.load(path, load_external_data=False).graph.input:
            if value.name in lengths:
                # Named like a dimension, it holds its length.
                profile.set_shape_input(value.name, *([size] for size in lengths[value.name]))
                continue
            dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            shapes = [[lengths[d][i] if isinstance(d, str) else d for d in dims] for i in range(3)]
            profile.set_shape(value.name, *shapes)
        config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    with log.recording() as errors:
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        pytest.fail("; ".join(errors))
    return bytes(plan)


def view_component(bundle: Bundle, component: str) -> tuple[GraphSpec, NetworkView]:
    """The graph that a component's engine is built from, and that as TensorRT parses it."""
    assert bundle.manifest.engine_limits is not None
    place = BuildPlace(
        bundle=bundle,
        choice=SM89,
        library=library_for(SM89.target),
        limits=bundle.manifest.engine_limits,
        compute_capability=89,
    )
    (graph,) = target_graphs(bundle.manifest, SM89.target, (component,))
    return graph, view_graph(place, graph)
