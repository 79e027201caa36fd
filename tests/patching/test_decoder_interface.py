"""What a decoder must take and give."""

from __future__ import annotations

import pytest

from gap_export.errors import PassError
from gap_export.patching.decoder_interface import read_decoder_interface
from tests.patching.graphs import BOOL, CACHE, FLOAT, HALF, INT64, interface, model, to_ir, value

IDS = value("position_ids", INT64, ["batch", "sequence"])


def read(inputs, outputs):
    return read_decoder_interface(to_ir(model([], inputs, outputs)).graph)


def refusal(inputs, outputs) -> str:
    with pytest.raises(PassError) as caught:
        read(inputs, outputs)
    return str(caught.value)


def test_sizes_are_those_of_the_interface():
    inputs, outputs = interface()
    facts = read([IDS, *inputs], outputs)
    assert (facts.num_layers, facts.num_key_value_heads, facts.head_dim) == (2, 2, 4)
    assert (facts.hidden_size, facts.vocab_size) == (8, 16)
    assert facts.position_ids.name == "position_ids"


def test_a_size_left_open_is_open():
    inputs, outputs = interface(embeds=(HALF, ["batch", "sequence", "width"]))
    assert read([IDS, *inputs], outputs).hidden_size is None


def test_no_position_ids_is_refused_naming_the_inputs():
    inputs, outputs = interface()
    message = refusal(inputs, outputs)
    assert "no input called position_ids: inputs inputs_embeds, attention_mask" in message
    assert "cannot be mended from outside" in message


@pytest.mark.parametrize(
    "ids", [value("position_ids", INT64, ["sequence"]),
            value("position_ids", FLOAT, ["batch", "sequence"])],
)  # fmt: skip
def test_ids_of_another_kind_are_refused(ids):
    inputs, outputs = interface()
    assert "position_ids is not what is fed" in refusal([ids, *inputs], outputs)


def test_ids_of_three_axes_are_those_of_m_rope():
    inputs, outputs = interface()
    ids = value("position_ids", INT64, [3, "batch", "sequence"])
    assert read([ids, *inputs], outputs).position_axes == 3


@pytest.mark.parametrize("axes", [2, 4, "axes"])
def test_ids_of_another_number_of_axes_are_refused(axes):
    inputs, outputs = interface()
    ids = value("position_ids", INT64, [axes, "batch", "sequence"])
    message = refusal([ids, *inputs], outputs)
    assert f"[{axes},batch,sequence]" in message
    assert "[3, batch, sequence] with M-RoPE" in message


@pytest.mark.parametrize(
    ("past", "seen"),
    [
        (["batch", "past", 2, 4], "[batch,past,2,4]"),
        (["batch", "heads", "past", 4], "[batch,heads,past,4]"),
        (["batch", 2, "past", "width"], "[batch,2,past,width]"),
        (["batch", 2, 64, 4], "[batch,2,64,4]"),
        (["batch", "past", 8], "[batch,past,8]"),
    ],
    ids=str,
)
def test_a_cache_of_another_layout_is_refused(past, seen):
    inputs, outputs = interface(past=past)
    message = refusal([IDS, *inputs], outputs)
    assert f"layout that is not known: past_key_values.0.key: FLOAT {seen}" in message
    assert "[batch, heads, past, head width]" in message


def test_a_cache_in_one_tensor_is_refused():
    inputs, outputs = interface(layers=0)
    one = value("past_key_values", FLOAT, [2, 2, *CACHE])
    message = refusal([IDS, *inputs, one], outputs)
    assert "KV cache has a layout that is not known: past_key_values;" in message


def test_no_cache_is_refused():
    inputs, outputs = interface(layers=0)
    assert "not known: no past_key_values" in refusal([IDS, *inputs], outputs)


def test_a_layer_that_is_left_out_is_refused():
    inputs, outputs = interface(layers=3)
    inputs = [each for each in inputs if ".1." not in each.name]
    assert "KV cache has a layout" in refusal([IDS, *inputs], outputs)


@pytest.mark.parametrize(
    "strange", [value("use_cache_branch", BOOL, [1]), value("num_logits_to_keep", INT64, [])]
)
def test_an_input_that_is_not_fed_is_refused_by_name(strange):
    inputs, outputs = interface()
    message = refusal([IDS, *inputs, strange], outputs)
    assert f"inputs that are not fed: {strange.name}" in message


@pytest.mark.parametrize("lacking", ["logits", "present.1.value"])
def test_an_output_that_is_missing_is_refused(lacking):
    inputs, outputs = interface()
    message = refusal([IDS, *inputs], [each for each in outputs if each.name != lacking])
    assert ("no logits" if lacking == "logits" else f"{lacking} missing") in message


def test_a_mask_of_another_kind_is_refused():
    inputs, outputs = interface()
    inputs[1] = value("attention_mask", FLOAT, ["batch", 1, "sequence", "total"])
    assert "attention_mask is not what is fed" in refusal([IDS, *inputs], outputs)
