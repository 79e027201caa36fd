"""``engine.json``: what was written is read again, and nothing else is."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from gap_export.engines.plan import (
    EnginePlan,
    EngineSpec,
    EngineTensor,
    ProfileSpec,
    ShapeRange,
    parse_plan,
)
from gap_export.errors import BundleError
from gap_export.spec.manifest import EngineLimits, QuantizationSpec

RANGE = ShapeRange(min=(1, 1), opt=(1, 4), max=(2, 8))
ENGINE = EngineSpec(
    component="embed_tokens",
    file="embed_tokens.engine",
    size=3,
    sha256="0" * 64,
    graph="embed_tokens.onnx",
    graph_sha256="1" * 64,
    weights_sha256="2" * 64,
    lowering="portable",
    dtype="float16",
    quantization=QuantizationSpec(dtype="int4", block_size=32, method="rtn", lm_head=False),
    kv_contract="none",
    weights="included",
    profiles=(ProfileSpec(name="only", shapes={"input_ids": RANGE}),),
    inputs=(EngineTensor(name="input_ids", dtype="int64", shape=(-1, -1), is_shape_tensor=False),),
    outputs=(),
    build_seconds=0.5,
    peak_memory_bytes=100,
)
PLAN = EnginePlan(
    library="tensorrt_rtx",
    library_version="1.7.1.116",
    target="rtx",
    compute_capability=89,
    limits=EngineLimits(max_prompt=8, max_new_tokens=2, max_batch=2, max_images=1),
    engines=(ENGINE,),
)


def rewritten(**changes: Any) -> bytes:
    return json.dumps({**json.loads(PLAN.to_json()), **changes}).encode()


def with_engine(**changes: Any) -> bytes:
    return dataclasses.replace(PLAN, engines=(dataclasses.replace(ENGINE, **changes),)).to_json()


def test_a_plan_is_read_as_it_was_written():
    assert parse_plan(PLAN.to_json()) == PLAN


def test_a_plan_of_an_unknown_gpu_is_read():
    plan = dataclasses.replace(PLAN, compute_capability=None)
    assert parse_plan(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "not a list of gap-export's engines"),
        (b'{"format": "gap-export-bundle"}', "not a list of gap-export's engines"),
        (rewritten(format_version=2), "version of engine.json not supported: 2"),
        (rewritten(format_version=True), "version of engine.json not supported"),
        (rewritten(surprise=1), "unknown \\['surprise'\\]"),
        (rewritten(library="tensorflow"), "library.*tensorflow"),
        (rewritten(compute_capability="89"), "compute_capability.*wrong type|compute_capability"),
        (rewritten(compute_capability=-1), "compute_capability is not a sensible value: -1"),
        (rewritten(engines=json.loads(PLAN.to_json())["engines"] * 2), "component is not"),
    ],
)
def test_a_plan_that_is_not_ours_is_refused(raw, message):
    with pytest.raises(BundleError, match=message):
        parse_plan(raw)


def test_a_changed_number_is_seen_by_the_plan_s_own_hash():
    plain = json.loads(PLAN.to_json())
    for change in (
        lambda p: p["limits"].update(max_prompt=9),
        lambda p: p["engines"][0].update(sha256="5" * 64),
        lambda p: p.update(compute_capability=90),
        lambda p: p.pop("plan_sha256"),
        lambda p: p.update(plan_sha256="0" * 64),
    ):
        changed = json.loads(json.dumps(plain))
        change(changed)
        with pytest.raises(BundleError, match=r"not what was written.*build the engines again"):
            parse_plan(json.dumps(changed).encode())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"file": "../x.engine"}, "leaves its folder"),
        ({"file": "/x.engine"}, "leaves its folder"),
        ({"graph": "../embed_tokens.onnx"}, "leaves its folder"),
        ({"file": "engine.json"}, "allowed: another name"),
        ({"size": -1}, "size of embed_tokens.engine"),
        ({"sha256": "xyz"}, "sha256 of embed_tokens.engine is not a sensible value: 'xyz'"),
        ({"graph_sha256": "0" * 63}, "graph_sha256"),
        ({"weights_sha256": "A" * 64}, "weights_sha256"),
        ({"profiles": ()}, "profiles of embed_tokens.engine"),
        ({"profiles": ENGINE.profiles * 2}, "each name once"),
        ({"profiles": (ProfileSpec(name="only", shapes={}),)}, "the inputs \\['input_ids'\\]"),
    ],
)
def test_an_engine_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(BundleError, match=message):
        parse_plan(with_engine(**changes))


@pytest.mark.parametrize(
    "shapes",
    [
        ShapeRange(min=(1,), opt=(1,), max=(1,)),
        ShapeRange(min=(2, 1), opt=(1, 1), max=(2, 1)),
        ShapeRange(min=(1, 1), opt=(1, 9), max=(2, 8)),
        ShapeRange(min=(-1, 1), opt=(1, 1), max=(2, 8)),
        ShapeRange(min=(1, 1), opt=(1, 1), max=(2, 1 << 31)),
    ],
)
def test_shapes_that_are_no_range_are_refused(shapes):
    profile = ProfileSpec(name="only", shapes={"input_ids": shapes})
    with pytest.raises(BundleError, match=r"profile only, input_ids of embed_tokens.engine"):
        parse_plan(with_engine(profiles=(profile,)))


def test_a_profile_is_found_by_its_name():
    both = tuple(ProfileSpec(name=n, shapes={"x": RANGE}) for n in ("prefill", "decode"))
    engine = dataclasses.replace(ENGINE, profiles=both)
    assert (engine.profile_index("prefill"), engine.profile_index("decode")) == (0, 1)
    with pytest.raises(KeyError):
        engine.profile_index("only")
