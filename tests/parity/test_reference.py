"""What is wrong on both sides alike, or in what the bundle says of its model, is noticed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from gap_export.bundle import open_bundle
from gap_export.checkpoint.find.source import Checkpoint
from gap_export.errors import ParityError
from gap_export.exporting.torch_backend import TorchBackend
from gap_export.parity.record import record_truth
from gap_export.parity.truth import TorchTruth
from gap_export.runtime import generation
from gap_export.runtime.backends.onnxruntime_backend import OnnxRuntimeBackend
from tests.parity import mutants
from tests.parity.checking import failed_outputs, level_of, run, statuses


def _keys_for_values(values):
    key, value = "past_key_values.0.key", "past_key_values.0.value"
    values[key], values[value] = values[value], values[key]


def _another_layers(values):
    values["past_key_values.1.key"] = values["past_key_values.0.key"]


def _heads_turned(values):
    values["past_key_values.0.key"] = values["past_key_values.0.key"].flip(1)


@pytest.mark.parametrize("spoil", [_keys_for_values, _another_layers, _heads_turned, None])
def test_a_reference_that_decodes_wrongly_from_its_cache_is_noticed(
    tiny_bundle, ask_torch, questions, monkeypatch, tmp_path, spoil
):
    """What is compared step by step would be wrong on both sides alike."""
    honest = TorchBackend.decode

    def decode(self, feed, cache):
        if spoil is None and cache.length:
            # Ids that a step does not read.
            feed = {**feed, "position_ids": np.zeros_like(feed["position_ids"])}
        logits = honest(self, feed, cache)
        if spoil is not None:
            spoil(cache.values)
        return logits

    monkeypatch.setattr(TorchBackend, "decode", decode)
    truth = ask_torch(questions[:1])
    report = run(tiny_bundle, truth, levels=("tensor",))
    assert "logits (cached)" in failed_outputs(report)
    with pytest.raises(ParityError, match="decoding with a cache is not its prefill without"):
        record_truth(open_bundle(tiny_bundle), truth, tmp_path / "golden")


def _renumbered(kept):
    return np.arange(len(kept))


def _shifted_image(kept):
    is_image = (kept > 5) & (kept < kept[-1] - 5)
    return np.where(is_image, kept - 1, kept)


def _reversed_image(kept):
    return np.concatenate([kept[:8], kept[8:11][::-1], kept[11:]])


@pytest.mark.parametrize("spoil", [_renumbered, _shifted_image, _reversed_image])
def test_wrong_ids_fed_to_both_sides_are_noticed(
    tiny_bundle, tiny_recipe, tiny_checkpoint, questions, monkeypatch, tmp_path, spoil
):
    """PyTorch and the bundle are fed by one session, so that no other level can tell."""
    honest = generation.build_kept_positions
    monkeypatch.setattr(generation, "build_kept_positions", lambda **given: spoil(honest(**given)))
    truth = TorchTruth(tiny_recipe, Checkpoint.of(tiny_checkpoint), questions[:1])
    report = run(tiny_bundle, truth, levels=("positions", "tensor", "token"))
    assert statuses(report) == {"positions": "failed", "tensor": "passed", "token": "passed"}
    assert "counted by hand" in level_of(report, "positions").reason
    with pytest.raises(ParityError, match="counted by hand"):
        record_truth(open_bundle(tiny_bundle), truth, tmp_path / "golden")


def _mask_ignored(decode, self, feed, cache):
    return decode(self, {**feed, "attention_mask": np.ones_like(feed["attention_mask"])}, cache)


def _rows_mixed(decode, self, feed, cache):
    return decode(self, feed, cache)[::-1]


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("spoil", [_mask_ignored, _rows_mixed])
def test_a_decoder_that_is_right_for_one_row_alone_is_noticed(
    tiny_bundle, truth, monkeypatch, spoil
):
    honest = OnnxRuntimeBackend.decode
    monkeypatch.setattr(OnnxRuntimeBackend, "decode", lambda *given: spoil(honest, *given))
    report = run(tiny_bundle, truth, levels=("tensor", "token"))
    assert failed_outputs(report).keys() == {"logits (padded batch)"}
    assert level_of(report, "token").figures["equal"] == report.questions


def _other_tokenizer(folder):
    file = folder / "tokenizer.json"
    file.write_text(file.read_text().replace('"red"', '"rad"'))


def _decoder(**changes):
    return lambda m: replace(m, decoder=replace(m.decoder, **changes))


FACTS = {
    "tokenizer": ({"edit_folder": _other_tokenizer}, "tokenizer.json is not the tokenizer that"),
    "end of an answer": (
        {"edit_manifest": _decoder(eos_token_ids=(7,))},
        "gap.json says decoder.eos_token_ids is [7], and recipe and checkpoint give",
    ),
    "context": (
        {"edit_manifest": _decoder(max_position_embeddings=9999)},
        "decoder.max_position_embeddings is 9999, and recipe and checkpoint give",
    ),
}


@pytest.mark.usefixtures("blind")
@pytest.mark.parametrize("level", ["tensor", "box"])
@pytest.mark.parametrize("name", FACTS)
def test_what_the_bundle_says_of_its_model_is_held_against_the_checkpoint(
    tiny_bundle, ask_torch, truth, tmp_path, name, level
):
    edits, words = FACTS[name]
    bundle = mutants.rewrite(tiny_bundle, tmp_path / "wrong", **edits)
    fresh = ask_torch(truth.questions)
    report = run(
        bundle,
        fresh,
        levels=("positions", level),
        fail_under={} if level == "tensor" else {"box": 0.0},
    )
    assert statuses(report)[level] == "failed" and words in level_of(report, level).reason
    with pytest.raises(ParityError, match="wrong already"):
        record_truth(open_bundle(bundle), fresh, tmp_path / "golden")
