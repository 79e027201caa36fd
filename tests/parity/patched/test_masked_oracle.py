"""The comparison with the unpatched graphs: that it passes is tested with the patches themselves.

Here: that it can fail, and refuses where there is nothing to compare with.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from gap_export.errors import ParityError, UsageError
from gap_export.graph.passes import insert_gap_remap
from gap_export.parity.patched import masked_oracle
from gap_export.parity.patched.masked_oracle import compare_with_unpatched
from gap_export.parity.patched.unpatched import UnpatchedBackend
from gap_export.patching import patch as patching
from gap_export.patching.prune_features import PruneAtPlaces
from tests.parity.mutants import rewrite
from tests.patching.cache_faults import FAULTS, break_cache
from tests.patching.conftest import *  # noqa: F403 - its fixtures
from tests.patching.graphs import write_gqa_decoder

EXPRESSION = ["the red circle"]


@pytest.fixture
def compare(tiny_export, images):
    def run(bundle, original=tiny_export, **options):
        return compare_with_unpatched(bundle, original, images[:1], EXPRESSION, **options)

    return run


def rows(report) -> dict[str, bool]:
    return {row.tensor: row.passed for row in report.outputs}


def failed(report) -> set[str]:
    return {row.tensor for row in report.outputs if not row.passed}


def test_a_report_has_a_row_for_each_output(tiny_export, patch, compare):
    report = compare(patch(tiny_export).bundle)
    assert rows(report) == {
        "image_features": True, "logits (prefill)": True, "logits (decode)": True,
        "logits (cached)": True,
    }  # fmt: skip
    assert report.passed and report.is_sensitive
    assert report.outputs[2].calls == 1


def test_nothing_dropped_has_no_compact_run(tiny_export, patch, compare):
    report = compare(patch(tiny_export, keep_ratio=1.0).bundle, num_steps=1)
    assert report.compact_max_abs_diff is None and report.passed
    assert "logits (decode)" not in rows(report)


def test_compact_positions_are_noticed(tiny_export, patch, compare, monkeypatch):
    ask = masked_oracle._ask

    def renumber(*given):
        question = ask(*given)
        return replace(question, pruned=question.renumbered)

    monkeypatch.setattr(masked_oracle, "_ask", renumber)
    report = compare(patch(tiny_export).bundle)
    assert failed(report) == {"logits (prefill)", "logits (decode)"}


def test_a_lost_node_is_noticed(tiny_export, patch, compare, monkeypatch):
    """GapRemap that gives slots as they are: every output but the features is off."""

    def identity(**options):
        made = gap_remap(**options)
        ids = made.inputs[0]
        last = list(made)[-1]
        last.replace_input_with(0, ids)
        zero = next(node for node in made if node.outputs[0].name == "slots_beyond_table")
        zero.replace_input_with(0, zero.inputs[1])
        return made

    gap_remap = insert_gap_remap.gap_remap_function
    monkeypatch.setattr(insert_gap_remap, "gap_remap_function", identity)
    report = compare(patch(tiny_export).bundle)
    assert failed(report) == {"logits (prefill)", "logits (decode)"}
    assert not report.passed


@pytest.mark.parametrize("fault", FAULTS)
def test_a_cache_that_is_wrong_on_both_sides_is_noticed(
    own_export, patch, compare, monkeypatch, fault
):
    """Where the look at the graph, which refuses most of them, saw nothing."""
    monkeypatch.setattr(patching, "check_cache_roles", lambda graph, num_layers: None)
    break_cache(own_export / "decoder_model_merged.onnx", fault)
    report = compare(patch(own_export).bundle, own_export)
    # Both decode from one cache alike.
    assert rows(report)["logits (decode)"] and rows(report)["logits (prefill)"]
    assert not rows(report)["logits (cached)"] and not report.passed
    assert "decoding with a cache is not its prefill without" in report.outputs[-1].reason


@pytest.mark.parametrize("name", ["tokenizer.json", "embed_tokens.onnx"])
def test_what_both_sides_read_is_the_exports_own(tiny_export, patch, compare, tmp_path, name):
    def edit(folder):
        file = folder / name
        raw = file.read_bytes()
        if name == "tokenizer.json":
            file.write_bytes(raw.replace(b'"red"', b'"rad"'))
            return
        model = onnx.load(file)
        model.graph.initializer[0].raw_data = model.graph.initializer[0].raw_data[::-1]
        onnx.save(model, file)

    wrong = rewrite(patch(tiny_export).bundle, tmp_path / "wrong", edit_folder=edit)
    with pytest.raises(ParityError, match=f"has not got the export's own file: {name}"):
        compare(wrong)


@pytest.mark.parametrize(
    ("part", "field", "value", "said"),
    [
        ("image", "mean", (0.1, 0.2, 0.3), "image.mean: .* in the recipe"),
        ("prompt", "template", "Find {expression} in <image> .", "prompt.template: .* in the rec"),
        ("box", "scale", 50.0, "box.scale: .* in the recipe, 50.0 in the bundle"),
        ("decoder", "eos_token_ids", (5,), "answers end with other tokens .*: 5; allowed: 2"),
    ],
)
def test_what_both_sides_read_in_the_manifest_is_the_recipes_own(
    tiny_export, patch, compare, tmp_path, part, field, value, said
):
    def edit(manifest):
        return replace(manifest, **{part: replace(getattr(manifest, part), **{field: value})})

    wrong = rewrite(patch(tiny_export).bundle, tmp_path / "wrong", edit_manifest=edit)
    with pytest.raises((ParityError, UsageError), match=said):
        compare(wrong)


def test_indices_of_other_tokens_are_noticed(tiny_export, patch, compare, monkeypatch):
    chosen = PruneAtPlaces._choose

    def off_by_one(self, model, features, steps):
        return steps("Sub", chosen(self, model, features, steps), [1])

    monkeypatch.setattr(PruneAtPlaces, "_choose", off_by_one)
    assert not rows(compare(patch(tiny_export).bundle))["image_features"]


def test_an_export_that_was_changed_is_refused(own_export, patch, compare):
    bundle = patch(own_export).bundle
    config = own_export / "config.json"
    config.write_text(config.read_text().replace("default", "defaul7"))
    with pytest.raises(UsageError, match="not the export that the bundle was patched from"):
        compare(bundle, own_export)
    config.unlink()
    with pytest.raises(UsageError, match="cannot be read"):
        compare(bundle, own_export)


def test_a_bundle_that_was_not_patched_is_refused(tiny_bundle, compare):
    with pytest.raises(UsageError, match="was not patched from an ONNX export"):
        compare(tiny_bundle)


def test_a_decoder_that_hides_nothing_is_refused(tiny_export, patch, compare, monkeypatch):
    decode = UnpatchedBackend.decode

    def see_all(self, feed, cache):
        mask = np.ones_like(feed["attention_mask"])
        return decode(self, {**feed, "attention_mask": mask}, cache)

    monkeypatch.setattr(UnpatchedBackend, "decode", see_all)
    with pytest.raises(UsageError, match="does not hide tokens"):
        compare(patch(tiny_export).bundle)


def test_attention_that_counts_the_mask_is_patched_but_not_compared(own_export, patch, compare):
    """GroupQueryAttention reads the mask's sum: zeros in the middle hide the last tokens instead.

    RoPE is outside of it and reads position_ids, so the patch itself is sound.
    """
    write_gqa_decoder(own_export / "decoder_model_merged.onnx", do_rotary=0)
    report = patch(own_export)
    assert report.rotary == ("RotaryEmbedding q_turned", "RotaryEmbedding k_turned")
    with pytest.raises(UsageError, match=r"does not hide tokens .* in the middle"):
        compare(report.bundle, own_export)


def test_attention_that_rotates_by_itself_is_not_patched(own_export, patch):
    write_gqa_decoder(own_export / "decoder_model_merged.onnx", do_rotary=1)
    with pytest.raises(UsageError, match=r"rotates by itself .*GroupQueryAttention attention"):
        patch(own_export)


@pytest.mark.parametrize("changes", [{"num_steps": 0}, {"images": []}, {"expressions": []}])
def test_nothing_to_compare_is_refused(tiny_export, images, changes):
    given = {"images": images[:1], "expressions": EXPRESSION, **changes}
    with pytest.raises(UsageError, match="nothing to compare with"):
        compare_with_unpatched(tiny_export, tiny_export, **given)
