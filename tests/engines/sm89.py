"""What TensorRT-RTX makes of graphs for a desktop GPU (SM 89), without one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest

from gap_export.bundle import Bundle
from gap_export.engines.build import target_graphs
from gap_export.engines.inspect import Interface, read_interface
from gap_export.engines.log import log_of
from gap_export.spec.manifest import GraphSpec
from tests.engines.bundles import SKIP_RTX, SM89
from tests.engines.gap_walk import NetworkView, view_network

trt = pytest.importorskip("tensorrt_rtx", reason=SKIP_RTX)

# Named dimension: smallest, usual and largest length of a profile.
Lengths = Mapping[str, tuple[int, int, int]]


def parse(path: Path) -> tuple[Any, Any, Any]:
    """Builder, network and parser, which must live as long as the network; or the test fails."""
    log = log_of(trt)
    builder = trt.Builder(log.handle)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log.handle)
    if not parser.parse_from_file(str(path)):
        pytest.fail("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    return builder, network, parser


def view_file(path: Path) -> tuple[Interface, NetworkView]:
    """An ONNX file as TensorRT parses it."""
    _builder, network, _parser = parse(path)
    return read_interface(network), view_network(trt, network)


def build_plan(path: Path, *profiles: Lengths) -> bytes:
    """The plan of an ONNX file, by TensorRT's own calls; the test fails with what it says."""
    log = log_of(trt)
    builder, network, _parser = parse(path)
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


def view_component(bundle: Bundle, component: str) -> tuple[GraphSpec, Interface, NetworkView]:
    """The graph that a component's engine is built from, and that as TensorRT parses it."""
    (graph,) = target_graphs(bundle.manifest, SM89.target, (component,))
    return graph, *view_file(bundle.file(graph.file))
