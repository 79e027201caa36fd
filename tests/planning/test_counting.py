"""What is counted without an export is what exported graphs multiply."""

from __future__ import annotations

import math

import onnx_ir as ir
import pytest

from gap_export.checkpoint.find.source import resolve_model
from gap_export.checkpoint.weights import PlacedTensor
from gap_export.exporting.trace import trace_component
from gap_export.families import Component, build_reference, resolve_pruning
from gap_export.graph.multiply_adds import count_multiply_adds
from gap_export.graph.pipelines import PIPELINES, run_pipeline
from gap_export.planning.counting import count_component, decode_sizes, prefill_sizes
from gap_export.spec.requests import PruningRequest


def components_of(pruner: str) -> dict[str, Component]:
    recipe, checkpoint = resolve_model("refshapes-llava")
    pruning = resolve_pruning(recipe, PruningRequest(pruner=pruner, keep_ratio=0.3))
    reference = build_reference(recipe, checkpoint, pruning, device="meta")
    return {one.name: one for one in reference.components}


def graph_of(component: Component) -> ir.Graph:
    """As the bundle has it; its weights are names."""
    placed = {
        key: PlacedTensor(
            location="weights",
            offset=0,
            length=4 * math.prod(weight.shape),
            dtype="F32",
            shape=tuple(weight.shape),
        )
        for key, weight in component.weight_refs.items()
    }
    traced = trace_component(component, placed=placed)
    run_pipeline(traced, PIPELINES[component.name])
    return traced.graph


@pytest.mark.parametrize("pruner", ["spatial", pytest.param("divprune", marks=pytest.mark.full)])
def test_a_tower_costs_what_its_graph_does(pruner: str) -> None:
    tower = components_of(pruner)["vision_encoder"]
    counted = count_component(tower, {"num_images": 1, "batch_size": 1}).multiply_adds
    assert counted == count_multiply_adds(graph_of(tower)) > 1e6


@pytest.mark.full
def test_prefill_costs_what_its_graph_does() -> None:
    decoder = components_of("spatial")["decoder_model_merged"]
    counted = count_component(decoder, prefill_sizes(60)).multiply_adds
    # The graph has the products of two tables of RoPE beside these, and no more.
    graph = count_multiply_adds(graph_of(decoder), length=60)
    assert counted == pytest.approx(graph, rel=0.01)


def test_attention_grows_with_what_is_in_the_cache() -> None:
    decoder = components_of("spatial")["decoder_model_merged"]
    first, second, third = (
        count_component(decoder, decode_sizes(past)).multiply_adds for past in (10, 20, 30)
    )
    # 4 layers, 5 heads of 32, queries times keys and probabilities times values.
    assert third - second == second - first == 10 * 2 * 4 * 5 * 32


def test_every_weight_of_the_decoder_multiplies_once() -> None:
    decoder = components_of("spatial")["decoder_model_merged"]
    names = [one.weight for one in count_component(decoder, decode_sizes(9)).products if one.weight]
    matrices = [key for key, one in decoder.weight_refs.items() if len(one.shape) == 2]
    assert sorted(names) == sorted(matrices)
