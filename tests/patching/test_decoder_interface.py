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


def test_ids_of_three_axes_are_those_of_m_rope():
    inputs, outputs = interface()
    ids = value("position_ids", INT64, [3, "batch", "sequence"])
    assert read([ids, *inputs], outputs).position_axes == 3


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (None, "no input called position_ids: inputs inputs_embeds, attention_mask"),
        (None, "cannot be mended from outside"),
        ((INT64, ["sequence"]), "position_ids is not what is fed"),
        ((FLOAT, ["batch", "sequence"]), "position_ids is not what is fed"),
        ((INT64, [2, "batch", "sequence"]), "[2,batch,sequence]"),
        ((INT64, [4, "batch", "sequence"]), "[3, batch, sequence] with M-RoPE"),
        ((INT64, ["axes", "batch", "sequence"]), "[axes,batch,sequence]"),
    ],
    ids=str,
)
def test_ids_that_are_not_there_or_of_another_kind_are_refused(ids, said):
    inputs, outputs = interface()
    given = [] if ids is None else [value("position_ids", *ids)]
    assert said in refusal([*given, *inputs], outputs)


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


@pytest.mark.parametrize(
    ("layers", "more", "less", "said"),
    [
        (0, value("past_key_values", FLOAT, [2, 2, *CACHE]), "", "not known: past_key_values;"),
        (0, None, "", "not known: no past_key_values"),
        (3, None, "past_key_values.1", "KV cache has a layout"),
        (2, value("use_cache_branch", BOOL, [1]), "", "that are not fed: use_cache_branch"),
        (2, value("num_logits_to_keep", INT64, []), "", "that are not fed: num_logits_to_keep"),
        (2, None, "logits", "logits missing"),
        (2, None, "present.1.value", "present.1.value missing"),
        (2, value("attention_mask", FLOAT, [1, 1]), "attention_mask", "mask is not what is fed"),
    ],
    ids=str,
)
def test_an_input_or_output_too_many_or_too_few_is_refused(layers, more, less, said):
    inputs, outputs = (
        [each for each in values if not less or not each.name.startswith(less)]
        for values in interface(layers=layers)
    )
    assert said in refusal([IDS, *inputs, *([] if more is None else [more])], outputs)
