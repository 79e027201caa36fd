"""Profiles: shapes that belong together, for every graph there is."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gap_export.engines.plan import ProfileSpec
from gap_export.engines.profiles import cache_capacity, check_cache_capacity, make_profiles
from gap_export.errors import BundleError, UsageError
from gap_export.spec.manifest import (
    EngineLimits,
    GraphSpec,
    TensorSpec,
    TextEncoderSpec,
    TilesSpec,
)

LIMITS = EngineLimits(max_prompt=40, max_new_tokens=8, max_batch=4, max_images=4)


def graph(contract: Any, **inputs: tuple[Any, ...]) -> GraphSpec:
    return GraphSpec(
        component="any",
        lowering="portable",
        dtype="float16",
        kv_contract=contract,
        file="any.onnx",
        inputs=tuple(TensorSpec(name=n, dtype="int64", shape=s) for n, s in inputs.items()),
        outputs=(),
    )


def decoder(contract: str) -> GraphSpec:
    length = {"concat": "past_sequence_length", "in_place": "cache_capacity"}[contract]
    return graph(
        contract,
        inputs_embeds=("batch_size", "sequence_length", 16),
        attention_mask=("batch_size", "total_sequence_length"),
        position_ids=("batch_size", "sequence_length"),
        kept_positions=("batch_size", "prompt_length"),
        past=("batch_size", 2, length, 8),
    )


VISION = graph("none", pixel_values=("num_images", 3, 32, 32), text_embeds=("batch_size", 16))


def three(profile: ProfileSpec, name: str, axis: int) -> tuple[int, int, int]:
    shapes = profile.shapes[name]
    return shapes.min[axis], shapes.opt[axis], shapes.max[axis]


def test_a_decoder_has_prefill_and_decode(sample_manifest):
    prefill, decode = make_profiles(sample_manifest, decoder("concat"), LIMITS)
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert three(prefill, "inputs_embeds", 1) == (1, 40, 40)
    assert three(prefill, "attention_mask", 1) == (1, 40, 40)
    assert three(prefill, "kept_positions", 1) == (1, 40, 40)
    assert three(prefill, "past", 2) == (0, 0, 0)
    assert three(decode, "inputs_embeds", 1) == (1, 1, 1)
    assert three(decode, "past", 2) == (1, 40, 47)
    assert three(decode, "attention_mask", 1) == (2, 41, 48)
    assert three(decode, "kept_positions", 1) == (1, 40, 40)
    assert three(decode, "inputs_embeds", 0) == (1, 1, 4)
    assert three(decode, "past", 3) == (8, 8, 8)


def test_a_table_of_three_axes_has_three_in_every_profile(sample_manifest):
    graph = decoder("concat")
    inputs = tuple(
        dataclasses.replace(tensor, shape=(3, *tensor.shape))
        if tensor.name == "kept_positions"
        else tensor
        for tensor in graph.inputs
    )
    for profile in make_profiles(
        sample_manifest, dataclasses.replace(graph, inputs=inputs), LIMITS
    ):
        assert three(profile, "kept_positions", 0) == (3, 3, 3)
        assert three(profile, "kept_positions", 2) == (1, 40, 40)
        assert len(profile.shapes["position_ids"].max) == 2


def test_a_cache_in_place_has_its_capacity_at_every_step(sample_manifest):
    profiles = make_profiles(sample_manifest, decoder("in_place"), LIMITS)
    assert cache_capacity(LIMITS) == 48
    assert [three(profile, "past", 2) for profile in profiles] == [(48, 48, 48)] * 2
    assert three(profiles[1], "attention_mask", 1) == (2, 41, 48)


def with_slots(slots: int) -> GraphSpec:
    return graph("in_place", **{"past_key_values.0.key": ("batch_size", 2, slots, 8)})


@pytest.mark.parametrize("cache", [with_slots(48), with_slots(49), decoder("concat"), VISION])
def test_a_cache_that_has_room_or_grows_is_fine(cache):
    check_cache_capacity((VISION, cache), LIMITS)


def test_a_cache_too_small_is_refused_with_what_to_export():
    said = (
        r"cache of any\.onnx.*: --max-prompt 40 and --max-new-tokens 8, 48 slots; "
        r"allowed: 47 slots together; export again with --max-prompt 40 --max-new-tokens 8, or"
    )
    with pytest.raises(UsageError, match=said):
        check_cache_capacity((VISION, with_slots(47)), LIMITS)


sizes = st.integers(1, 5000)
any_limits = st.builds(
    EngineLimits, max_prompt=sizes, max_new_tokens=sizes, max_batch=sizes, max_images=sizes
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)
@given(limits=any_limits)
def test_the_mask_is_as_long_as_past_and_new_tokens(sample_manifest, limits):
    for profile in make_profiles(sample_manifest, decoder("concat"), limits):
        lengths = zip(
            three(profile, "past", 2),
            three(profile, "inputs_embeds", 1),
            three(profile, "attention_mask", 1),
            strict=True,
        )
        assert all(past + new == total for past, new, total in lengths)
        for name in profile.shapes:
            for axis in range(len(profile.shapes[name].min)):
                low, usual, high = three(profile, name, axis)
                assert 0 <= low <= usual <= high
                assert high <= max(limits.max_batch, cache_capacity(limits), 16)


def test_a_graph_without_cache_has_one_profile(sample_manifest):
    made = make_profiles(
        sample_manifest, graph("none", input_ids=("batch_size", "sequence_length")), LIMITS
    )
    assert [profile.name for profile in made] == ["only"]
    assert three(made[0], "input_ids", 0) == (1, 1, 4)
    assert three(made[0], "input_ids", 1) == (1, 20, 40)


def test_a_text_is_no_longer_than_its_tower_reads(sample_manifest):
    tower = TextEncoderSpec(template="{expression}", tokenizer_file="t.json", max_tokens=24)
    manifest = dataclasses.replace(sample_manifest, text_encoder=tower)
    (made,) = make_profiles(
        manifest, graph("none", input_ids=("batch_size", "text_length")), LIMITS
    )
    assert three(made, "input_ids", 1) == (1, 12, 24)


def test_an_image_is_asked_about_as_often_as_a_batch_allows(sample_manifest):
    limits = dataclasses.replace(LIMITS, max_batch=3, max_images=3)
    (made,) = make_profiles(sample_manifest, VISION, limits)
    assert three(made, "pixel_values", 0) == (1, 1, 3)
    assert three(made, "text_embeds", 0) == (1, 1, 3)


def test_tiles_come_all_at_once_each_with_its_text(sample_manifest):
    image = dataclasses.replace(
        sample_manifest.image, preparation="anyres", tiles=TilesSpec(resolutions=((64, 64),))
    )
    manifest = dataclasses.replace(sample_manifest, image=image)
    limits = dataclasses.replace(LIMITS, max_batch=1, max_images=5)
    (made,) = make_profiles(manifest, VISION, limits)
    assert three(made, "pixel_values", 0) == (1, 5, 5)
    assert three(made, "text_embeds", 0) == (1, 5, 5)


def test_a_dimension_of_an_unknown_name_is_refused(sample_manifest):
    with pytest.raises(BundleError, match=r"any\.onnx has a dimension .*: colour of input x"):
        make_profiles(sample_manifest, graph("none", x=("batch_size", "colour")), LIMITS)
