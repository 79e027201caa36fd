"""Engines are built for real, for GPUs that are not here."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from typing import Any

import numpy as np
import pytest

from gap_export.bundle import open_bundle
from gap_export.engines import build as build_module
from gap_export.engines import compile as compile_module
from gap_export.engines.build import build_engines, resolve_limits, target_graphs
from gap_export.engines.folder import read_engine_folder
from gap_export.engines.profiles import check_cache_capacity, make_profiles
from gap_export.engines.targets import TARGETS, TargetChoice
from gap_export.errors import BundleError, UsageError
from gap_export.spec.requests import BuildOptions, LimitsRequest
from tests.engines.bundles import (
    LIMITS,
    SKIP_RTX,
    SM86,
    SM89,
    Recorder,
    contents,
    copy_with_fixed_cache,
    one_node_model,
)

trt = pytest.importorskip("tensorrt_rtx", reason=SKIP_RTX)

COMPONENT = ("embed_tokens",)
ORIN = TargetChoice(target=TARGETS["orin"], compute_capability=87)


def test_every_component_is_built_and_said_of_what(built_bundle):
    folder = read_engine_folder(built_bundle, "rtx-sm89", verify="full")
    plan = folder.plan
    assert (plan.library, plan.library_version) == ("tensorrt_rtx", trt.__version__)
    assert (plan.target, plan.compute_capability, plan.limits) == ("rtx", 89, LIMITS)
    graphs = target_graphs(built_bundle.manifest, SM89.target)
    assert [e.component for e in plan.engines] == [g.component for g in graphs]
    for engine, graph in zip(plan.engines, graphs, strict=True):
        path = folder.path / engine.file
        assert hashlib.sha256(path.read_bytes()).hexdigest() == engine.sha256
        assert (
            engine.graph_sha256
            == hashlib.sha256(built_bundle.file(graph.file).read_bytes()).hexdigest()
        )
        assert engine.profiles == make_profiles(built_bundle.manifest, graph, LIMITS)
        assert [t.name for t in engine.inputs] == [t.name for t in graph.inputs]
        assert [t.dtype for t in engine.outputs] == [t.dtype for t in graph.outputs]
        assert engine.build_seconds > 0 and engine.peak_memory_bytes > 10 << 20
    # The bundle is as good as before.
    assert open_bundle(built_bundle.path, verify="full").manifest == built_bundle.manifest


def test_engines_hold_the_weights(built_bundle, tiny_graphs):
    """A plan for a GPU that is not here cannot be run, but its weights can be found in it."""
    from safetensors.numpy import load_file

    plan = read_engine_folder(built_bundle, "rtx-sm89").file("embed_tokens").read_bytes()
    weights = [
        tensor
        for file in built_bundle.path.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if name.endswith("embed_tokens.weight")
    ]
    assert len(weights) == 1
    assert np.ascontiguousarray(weights[0]).tobytes() in plan


def test_a_component_is_built_alone_and_the_other_engines_stay(trt_bundle):
    progress = Recorder()
    build_engines(trt_bundle, SM89, only=COMPONENT, progress=progress)
    assert (progress.stages, progress.steps) == ([("building embed_tokens", 100)], [100])
    first = read_engine_folder(trt_bundle, "rtx-sm89").engine("embed_tokens")
    build_engines(trt_bundle, SM89, only=("text_encoder",))
    folder = read_engine_folder(trt_bundle, "rtx-sm89", verify="full")
    assert {e.component for e in folder.plan.engines} == {"embed_tokens", "text_encoder"}
    assert folder.engine("embed_tokens") == first


def test_engines_of_other_sizes_do_not_mix(trt_bundle):
    build_engines(trt_bundle, SM89, only=COMPONENT)
    before = contents(trt_bundle)
    with pytest.raises(UsageError, match=r"built for other sizes: max prompt 40.*leave out --only"):
        build_engines(
            trt_bundle, SM89, only=("text_encoder",), overrides=LimitsRequest(max_batch=1)
        )
    assert contents(trt_bundle) == before


def test_engines_that_are_damaged_do_not_stay_beside_a_new_one(trt_bundle):
    build_engines(trt_bundle, SM89, only=COMPONENT)
    (trt_bundle.path / "engines" / "rtx-sm89" / "engine.json").write_text("damaged")
    said = r"other engines in rtx-sm89 cannot stay: engine\.json is not JSON.*leave out --only"
    with pytest.raises(BundleError, match=said):
        build_engines(trt_bundle, SM89, only=COMPONENT)


def test_sizes_may_be_others_than_the_bundles(trt_bundle):
    overrides = LimitsRequest(max_prompt=16, max_new_tokens=3, max_batch=1)
    folder = build_engines(trt_bundle, SM89, only=COMPONENT, overrides=overrides)
    assert vars(folder.plan.limits) == {
        "max_prompt": 16,
        "max_new_tokens": 3,
        "max_batch": 1,
        "max_images": 1,
    }
    shapes = folder.engine("embed_tokens").profiles[0].shapes["input_ids"]
    assert shapes.max == (1, 16)


def test_a_folder_is_replaced_when_the_new_one_is_complete(one_graph_bundle):
    bundle = one_graph_bundle(one_node_model("Relu", {"x": (1, [2])}, {"y": (1, [2])}))
    # What a killed build left is swept.
    left = bundle.path / "engines" / ".rtx-sm89.gap-draft-0a1b2c3d"
    left.mkdir(parents=True)
    (left / "half.engine").write_bytes(b"x")
    build_engines(bundle, SM89)
    build_engines(bundle, SM86)
    plans = [read_engine_folder(bundle, f).plan for f in ("rtx-sm86", "rtx-sm89")]
    assert [plan.compute_capability for plan in plans] == [86, 89]
    (bundle.path / "engines" / "rtx-sm89" / "engine.json").write_text("damaged")
    build_engines(bundle, SM89, overrides=LimitsRequest(max_prompt=8))
    assert read_engine_folder(bundle, "rtx-sm89").plan.limits.max_prompt == 8
    assert not [name for name in contents(bundle) if name.startswith(".")]


def test_options_and_warnings_of_memory_reach_builder_and_user(trt_bundle, monkeypatch):
    seen, told = [], []
    monkeypatch.setattr(build_module, "free_memory", lambda: 1000)
    real = compile_module._configure

    def configure(*args: Any) -> Any:
        config = real(*args)
        pool = config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE)
        seen.append((pool, config.builder_optimization_level))
        return config

    monkeypatch.setattr(compile_module, "_configure", configure)
    options = BuildOptions(workspace_mib=64, optimization_level=1, weights="streamed")
    folder = build_engines(trt_bundle, SM89, only=COMPONENT, options=options, warn=told.append)
    assert seen == [(64 << 20, 1)]
    assert folder.engine("embed_tokens").weights == "streamed"
    assert len(told) == 1 and told[0].startswith("building takes about")


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
@pytest.mark.usefixtures("full_tensorrt")
def test_a_builder_without_streams_builds_too(trt_bundle, cache_folder, caplog):
    """The way of TensorRT 10.3 on an Orin."""
    folder = build_engines(trt_bundle, ORIN, only=COMPONENT)
    assert (folder.plan.library_version, folder.plan.compute_capability) == ("10.3.0", 87)
    assert read_engine_folder(trt_bundle, "orin-sm87", verify="full").plan == folder.plan
    caches = list((cache_folder / "timing").iterdir())
    assert [cache.name for cache in caches] == ["tensorrt-10.3.0-sm87.cache"]
    caches[0].write_bytes(b"damaged")
    with caplog.at_level(logging.INFO, logger="gap_export"):
        build_engines(trt_bundle, ORIN, only=COMPONENT)
    assert "is damaged and is left out" in caplog.text


@pytest.mark.usefixtures("full_tensorrt")
def test_a_lowering_the_release_does_not_build_is_refused(trt_bundle):
    """A bundle made for JetPack 7.2, on a device with 6.2."""
    manifest = trt_bundle.manifest
    fused = dataclasses.replace(
        manifest,
        graphs=tuple(dataclasses.replace(g, lowering="fused") for g in manifest.graphs),
        targets=tuple(dataclasses.replace(t, lowering="fused") for t in manifest.targets),
    )
    with pytest.raises(
        UsageError, match=r"10\.3\.0 does not build .* orin: lowering fused; allowed: portable"
    ):
        build_engines(dataclasses.replace(trt_bundle, manifest=fused), ORIN)


@pytest.mark.usefixtures("full_tensorrt")
def test_without_the_gpu_that_is_needed_a_build_is_refused(trt_bundle, monkeypatch):
    gpu = dataclasses.replace(build_module.find_gpu(), name="RTX 4090", compute_capability=89)
    monkeypatch.setattr(build_module, "find_gpu", lambda: gpu)
    with pytest.raises(UsageError, match=r"RTX 4090, SM 89; allowed: SM 87; copy the bundle"):
        build_engines(trt_bundle, ORIN)
    monkeypatch.setattr(build_module, "find_gpu", lambda: None)
    with pytest.raises(UsageError, match=r"built on the GPU they are for: no NVIDIA GPU"):
        build_engines(trt_bundle, ORIN)
    with pytest.raises(UsageError, match="without their weights on a GPU alone"):
        build_engines(trt_bundle, SM89, options=BuildOptions(weights="stripped"))


@pytest.mark.parametrize(
    ("only", "sizes", "said"),
    [
        (("projector",), {}, "no such component: projector; allowed: vision_encoder"),
        ((), {"max_prompt": 0}, "no such --max-prompt"),
        ((), {"max_prompt": 100_000}, "no such --max-prompt"),
        ((), {"max_new_tokens": -1}, "no such --max-new-tokens"),
        ((), {"max_batch": 0}, "no such --batch"),
        ((), {"max_prompt": 156, "max_new_tokens": 101}, "context: .*; allowed: 256 tokens"),
    ],
)
def test_a_component_or_size_there_is_not_is_refused(trt_bundle, tiny_bundle, only, sizes, said):
    with pytest.raises(BundleError, match="not made for this target: rtx; allowed: none"):
        build_engines(open_bundle(tiny_bundle), SM89)
    assert trt_bundle.manifest.decoder.max_position_embeddings == 256
    with pytest.raises(UsageError, match=said):
        build_engines(trt_bundle, SM89, only=only, overrides=LimitsRequest(**sizes))


@pytest.mark.parametrize("sizes", [{"max_prompt": 41}, {"max_new_tokens": 9}])
def test_more_than_a_fixed_cache_holds_is_refused_before_anything_is_built(
    tiny_bundle, tmp_path, sizes
):
    bundle = copy_with_fixed_cache(tiny_bundle, tmp_path / "b", slots=48)
    # A component alone as well: the decoder could not follow it.
    for only in ((), COMPONENT):
        with pytest.raises(UsageError, match=r"49 slots; allowed: 48 slots together; export again"):
            build_engines(bundle, SM89, only=only, overrides=LimitsRequest(**sizes))
    assert contents(bundle) == set()


def test_a_cache_that_grows_may_have_more_than_the_bundle_says(trt_bundle):
    manifest = trt_bundle.manifest
    most = manifest.decoder.max_position_embeddings
    limits = resolve_limits(manifest, LimitsRequest(max_prompt=most - 100, max_new_tokens=100))
    *_, decoder = target_graphs(manifest, SM89.target)
    check_cache_capacity((decoder,), limits)
    _, decode = make_profiles(manifest, decoder, limits)
    assert decode.shapes["attention_mask"].max == (2, most)


def test_what_was_exported_may_be_built_even_beyond_the_context(trt_bundle):
    """Caches of the longest prompt there is, and an answer, have more slots than ever are used."""
    most = trt_bundle.manifest.decoder.max_position_embeddings
    own = dataclasses.replace(LIMITS, max_prompt=most)
    manifest = dataclasses.replace(trt_bundle.manifest, engine_limits=own)
    assert resolve_limits(manifest, LimitsRequest(max_batch=1)).max_prompt == most
