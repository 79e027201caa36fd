"""Which graphs an export makes for TensorRT, and for what sizes."""

from __future__ import annotations

import dataclasses

import onnx
import pytest
from onnx import TensorProto, helper

from gap_export.engines.targets import parse_targets
from gap_export.errors import UsageError
from gap_export.exporting.engine_forms import (
    GraphForm,
    choose_form,
    describe_targets,
    find_limits,
)
from gap_export.spec.manifest import GraphSpec, TilesSpec
from gap_export.spec.requests import LimitsRequest


def forms(*specs, base_dtype="float16", lowering=None):
    return choose_form(parse_targets(specs), base_dtype=base_dtype, lowering=lowering)


def test_each_target_gets_the_best_lowering_all_its_platforms_build():
    found = forms("rtx", "orin", "thor", "desktop")
    assert found["rtx"] == GraphForm(lowering="fused", dtype="float16")
    assert {found[name].lowering for name in ("orin", "thor", "desktop")} == {"portable"}


def test_float32_bundle_gets_engines_in_float16():
    assert forms("orin", base_dtype="float32")["orin"].dtype == "float16"


def test_bfloat16_bundle_keeps_it_but_on_turing():
    assert forms("rtx:sm89", base_dtype="bfloat16")["rtx"].dtype == "bfloat16"
    assert forms("rtx:sm75", base_dtype="bfloat16")["rtx"].dtype == "float16"
    # One form a target: what all of its generations can compute in.
    assert forms("rtx:sm89", "rtx:sm75", base_dtype="bfloat16")["rtx"].dtype == "float16"
    assert forms("rtx:sm75", "rtx:sm89", base_dtype="bfloat16")["rtx"].dtype == "float16"


def test_lowering_is_the_users_to_choose():
    assert forms("rtx", lowering="portable")["rtx"].lowering == "portable"
    assert forms("orin", lowering="fused")["orin"].lowering == "fused"


@pytest.mark.parametrize(
    ("operators", "noted"),
    [
        ("Neg", {}),
        ("Neg CumSum", dict.fromkeys(("desktop", "orin", "thor"), "CumSum")),
        ("DequantizeLinear", dict.fromkeys(("desktop", "orin"), "DequantizeLinear")),
    ],
)
def test_what_the_oldest_tensorrt_does_not_document_is_noted(tmp_path, operators, noted):
    nodes = [helper.make_node(name, ["x"], [name], name) for name in operators.split()]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [])), tmp_path / "g.onnx")
    graph = GraphSpec(
        component="vision_encoder",
        lowering="portable",
        dtype="float16",
        kv_contract="none",
        file="g.onnx",
        inputs=(),
        outputs=(),
    )
    choices = parse_targets(["rtx:sm89", "desktop", "orin", "thor"])
    made = choose_form(choices, base_dtype="float16", lowering="portable")
    found = {t.name: t.preflight for t in describe_targets(tmp_path, choices, made, [graph])}
    # Built by the export itself: nothing is to be foretold.
    assert found.pop("rtx") == ()
    for name, (verdict,) in found.items():
        wanted = (noted[name],) if name in noted else ()
        assert verdict.operators == wanted
        assert verdict.verdict == ("unverified" if wanted else "fine")
        assert [reason.split(": ")[0] for reason in verdict.reasons] == [
            parse_targets([name])[0].target.platforms[0].name for _ in wanted
        ]


def limits(manifest, **how):
    return find_limits(manifest, num_template_tokens=6, request=LimitsRequest(**how))


def test_limits_are_the_largest_the_bundle_can_be_asked_for(sample_manifest):
    found = limits(sample_manifest)
    # 6 of the template, 5 visual, 12 of the expression, 4 that tokens in a row may split into.
    assert (found.max_prompt, found.max_new_tokens) == (27, 8)
    assert (found.max_batch, found.max_images) == (1, 1)


def test_limits_end_at_the_models_context(sample_manifest):
    decoder = dataclasses.replace(sample_manifest.decoder, max_position_embeddings=20)
    assert limits(dataclasses.replace(sample_manifest, decoder=decoder)).max_prompt == 20


def test_limits_of_a_tiled_image_count_base_tile_and_newlines(sample_manifest):
    tiles = TilesSpec(resolutions=((32, 64), (64, 64)))
    image = dataclasses.replace(sample_manifest.image, preparation="anyres", tiles=tiles)
    decoder = dataclasses.replace(sample_manifest.decoder, max_position_embeddings=4096)
    found = limits(dataclasses.replace(sample_manifest, image=image, decoder=decoder))
    # Five tiles of 5 tokens, and 2 x 4 rows that end in a newline.
    assert found.max_prompt == 6 + 5 * 5 + 8 + 12 + 4
    assert found.max_images == 5


@pytest.mark.parametrize("seen", [0, 11, 65])
def test_prompt_too_short_or_beyond_the_context_is_refused(sample_manifest, seen):
    with pytest.raises(UsageError, match=r"--max-prompt: \d+; allowed: 12..64"):
        limits(sample_manifest, max_prompt=seen)
    assert limits(sample_manifest, max_prompt=12).max_prompt == 12


def test_answer_and_batch_out_of_range_are_refused(sample_manifest):
    with pytest.raises(UsageError, match="--max-new-tokens: 0"):
        limits(sample_manifest, max_new_tokens=0)
    with pytest.raises(UsageError, match="--batch: 0"):
        limits(sample_manifest, max_batch=0)
    assert limits(sample_manifest, max_batch=4).max_images == 4
