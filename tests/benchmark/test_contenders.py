"""Which bundles may be compared, with which, and what a decoder must do at least."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gap_export.benchmark.contenders import (
    Contender,
    contenders_of,
    costs_of,
    refuse_different_weights,
    short_names,
    unpruned_of,
)
from gap_export.bundle import Bundle, open_bundle
from gap_export.errors import BundleError, UsageError
from gap_export.spec.manifest import QuantizationSpec, SourceFile, SourcePart, SourceSpec


def bundle_of(manifest, name="one"):
    return Bundle(path=Path("/bundles") / name, manifest=manifest)


def source_of(**hashes):
    parts = tuple(
        SourcePart(
            role=role,
            location="/nowhere",
            files=(SourceFile(path="model.safetensors", size=1, sha256=sha256),),
        )
        for role, sha256 in hashes.items()
    )
    return SourceSpec(parts=parts)


def test_bundles_of_one_checkpoint_are_compared_whatever_was_done_to_them(sample_manifest):
    other = replace(sample_manifest, dtype="float16")
    refuse_different_weights([bundle_of(sample_manifest), bundle_of(other)])


@pytest.mark.parametrize("change", ["hash", "name", "random", "seed", "nothing shared"])
def test_bundles_of_different_weights_are_refused(sample_manifest, change):
    first = replace(sample_manifest, source=source_of(main="a"))
    other = replace(first, source=source_of(main="b"))
    if change == "name":
        other = replace(first, model=replace(first.model, name="another"))
    elif change == "random":
        other = replace(first, source=SourceSpec(parts=(), random_seed=0))
    elif change == "seed":
        first = replace(first, source=SourceSpec(parts=(), random_seed=0))
        other = replace(first, source=SourceSpec(parts=(), random_seed=1))
    elif change == "nothing shared":
        other = replace(first, source=source_of(base="a"))
    with pytest.raises(UsageError, match="different weights") as raised:
        refuse_different_weights([bundle_of(first), bundle_of(other, "two")])
    assert "/bundles/one and /bundles/two" in str(raised.value)


def test_a_part_that_only_one_was_made_of_says_nothing(sample_manifest):
    first = replace(sample_manifest, source=source_of(main="a"))
    other = replace(first, source=source_of(main="a", tower="b"))
    refuse_different_weights([bundle_of(first), bundle_of(other)])


def contender(manifest, backend="ort"):
    return Contender(name="x", label="x", backend=backend, bundle=bundle_of(manifest))


def test_what_a_pruned_one_is_compared_with_has_its_backend_and_dtype(sample_manifest):
    pruning = replace(sample_manifest.pruning, num_kept_tokens=16, num_emitted_tokens=16)
    graph = replace(sample_manifest.graphs[0], component="decoder_model_merged")
    kept = replace(sample_manifest, graphs=(graph,))
    whole = replace(kept, pruning=pruning)
    pruned, unpruned = contender(kept), contender(whole)
    half, elsewhere = contender(replace(whole, dtype="float16")), contender(whole, "trt")
    assert unpruned_of(pruned, [half, elsewhere, unpruned]) is unpruned
    assert unpruned_of(pruned, [half, elsewhere]) is None
    assert unpruned_of(unpruned, [unpruned]) is None


def test_an_int8_tower_and_activations_are_no_speed_up_of_pruning(sample_manifest):
    tower = replace(sample_manifest.graphs[0], component="vision_encoder")
    held = QuantizationSpec(dtype="int4", block_size=32, method="rtn", lm_head=True)
    decoder = replace(tower, component="decoder_model_merged", quantization=held)
    manifest = replace(sample_manifest, graphs=(tower, decoder))
    eight = replace(manifest, graphs=(replace(tower, linear_layers="int8"), decoder))
    rounded = replace(manifest, graphs=(tower, replace(decoder, activations="int8")))
    said = [contender(one).dtype for one in (manifest, eight, rounded)]
    assert said == [
        "float32 (int4, LM head too)",
        "float32 (int4, LM head too, int8 tower)",
        "float32 (int4, LM head too, int8 activations)",
    ]


def test_names_are_as_long_as_tells_them_apart():
    paths = [Path("/a/x/bundle"), Path("/a/y/bundle"), Path("/a/y/other")]
    assert short_names(paths[1:]) == ["bundle", "other"]
    assert short_names(paths) == ["x/bundle", "y/bundle", "y/other"]


def test_a_bundle_named_twice_is_refused(demo_bundle):
    with pytest.raises(UsageError, match="named twice"):
        contenders_of([demo_bundle, demo_bundle / "."], ["ort"])


def test_an_unknown_backend_and_no_bundle_are_refused(demo_bundle, tmp_path):
    with pytest.raises(UsageError, match="no such backend: tpu"):
        contenders_of([demo_bundle], ["ort", "tpu"])
    with pytest.raises(UsageError, match="no bundle"):
        contenders_of([], ["ort"])
    with pytest.raises(BundleError):
        contenders_of([tmp_path], ["ort"])


def test_a_form_is_what_a_session_is_opened_with(demo_bundle):
    whole, base = contenders_of([demo_bundle], ["ort", "ort:base"])
    assert whole.arguments(2) == {"backend": "onnxruntime", "num_threads": 2}
    assert base.arguments(None) == {
        "backend": "onnxruntime", "form": "base", "num_threads": None,
    }  # fmt: skip
    assert base.name.endswith(" ort:base")


def test_a_backend_is_measured_once(demo_bundle):
    assert len(contenders_of([demo_bundle], ["ort", "ort"])) == 1


def test_what_a_decoder_must_do_is_counted_by_the_graph_as_by_the_shapes(demo_bundle):
    bundle = open_bundle(demo_bundle)
    costs, spec = costs_of(bundle), bundle.manifest.decoder
    assert costs.weight_bytes == 4 * costs.weights
    assert costs.head == spec.vocab_size * spec.hidden_size < costs.weights
    # Of one token: two operations for each weight, and attention to itself.
    assert costs.prefill_operations(1) == 2 * (costs.weights + costs.attended)
    assert costs.decode_bytes(10) - costs.decode_bytes(0) == 10 * costs.cache_bytes
