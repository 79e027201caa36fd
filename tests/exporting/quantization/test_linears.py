"""Which layers of a decoder are quantized."""

from __future__ import annotations

from gap_export.exporting.quantization import linear_keys


def test_attention_and_mlp_of_every_layer_and_the_head_only_where_asked(tiny_graphs):
    decoder = tiny_graphs.reference().component("decoder_model_merged")
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    keys = [f"layers.{index}.{part}.weight" for index in range(2) for part in parts]
    assert list(linear_keys(decoder, lm_head=False)) == keys
    assert list(linear_keys(decoder, lm_head=True)) == [*keys, "lm_head.weight"]
    assert set(keys) < set(decoder.weight_refs)
