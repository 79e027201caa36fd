"""What a bundle says of its model; how it is noticed in a check is in test_check.py."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from gap_export.parity.facts import find_other_facts
from gap_export.spec.manifest import QuestionSpec, TextEncoderSpec

QUESTION = QuestionSpec(start="USER:", end="ASSISTANT:", image="<image>")


def test_a_bundle_of_before_long_texts_had_segments_is_as_it_was_made(sample_manifest):
    tower = TextEncoderSpec(template="{expression}", tokenizer_file="t.json", max_tokens=77)
    reference = SimpleNamespace(
        decoder_spec=sample_manifest.decoder,
        text_encoder_spec=replace(tower, long_texts="segments"),
        assets={},
    )

    def found(question):
        prompt = replace(sample_manifest.prompt, question=question)
        manifest = replace(sample_manifest, prompt=prompt, text_encoder=tower)
        bundle = SimpleNamespace(manifest=manifest)
        return list(find_other_facts(bundle, reference, sample_manifest.image))

    assert found(None) == []
    (wrong,) = found(QUESTION)
    assert "text_encoder.long_texts is 'cut'" in wrong
