"""The graphs as TensorRT sees them: parsed and built, without a GPU, for a desktop one (SM 89)."""

from __future__ import annotations

import pytest

from tests.engines.sm89 import build_plan

LENGTHS = {
    "num_images": (1, 1, 1),
    "batch_size": (1, 1, 2),
    "sequence_length": (1, 16, 32),
    "past_sequence_length": (0, 16, 32),
    "total_sequence_length": (1, 32, 64),
    "prompt_length": (1, 16, 32),
    "text_length": (1, 8, 16),
}


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
    assert len(build_plan(tiny_graphs.path(component, pruner, 0.3), LENGTHS)) > 1000
