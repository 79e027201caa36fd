"""The graphs as TensorRT sees them: parsed and built, without a GPU, for a desktop one (SM 89)."""

from __future__ import annotations

from pathlib import Path

import pytest

trt = pytest.importorskip("tensorrt_rtx", reason="needs the extra trt-rtx")

# Named dimension: smallest, usual and largest length of the profile.
LENGTHS = {
    "num_images": (1, 1, 1),
    "batch_size": (1, 1, 2),
    "sequence_length": (1, 16, 32),
    "past_sequence_length": (0, 16, 32),
    "total_sequence_length": (1, 32, 64),
    "prompt_length": (1, 16, 32),
    "text_length": (1, 8, 16),
}


def build(path: Path) -> bytes:
    import onnx

    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(path))
    assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]
    profile = builder.create_optimization_profile()
    for value in onnx.load(path, load_external_data=False).graph.input:
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        shapes = [[LENGTHS[d][i] if isinstance(d, str) else d for d in dims] for i in range(3)]
        profile.set_shape(value.name, *shapes)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return bytes(plan)


@pytest.mark.parametrize(
    ("component", "pruner"),
    [
        ("vision_encoder", "spatial"),
        ("vision_encoder", "fastervlm"),
        ("vision_encoder", "text"),
        ("text_encoder", "text"),
        ("embed_tokens", "spatial"),
        ("decoder_model_merged", "spatial"),
    ],
)
def test_graph_builds(tiny_graphs, component, pruner):
    assert len(build(tiny_graphs.path(component, pruner, 0.3))) > 1000
