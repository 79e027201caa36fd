"""One module computes what transformers' own Llama, Mistral, Qwen2 and Qwen3 do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gap_export.checkpoint.weights import index_files, place_reference
from gap_export.exporting.trace import save_graph, trace_component
from gap_export.families.common.checkpoints.configs import decoder_shape
from gap_export.families.common.components import decoder_component
from gap_export.families.common.decoder_kind import LLAMA
from gap_export.families.common.modules.attention import key_bias, rope_rotation, rotate
from gap_export.families.common.modules.decoder_stack import TokenEmbedding, rope_constants
from gap_export.families.common.modules.expected import decoder_key
from gap_export.families.common.modules.llama_decoder import LlamaDecoder
from gap_export.graph.pipelines import PIPELINES, run_pipeline
from gap_export.spec.architecture import DecoderShape
from gap_export.spec.positions import gap_remap

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "llama-biased": (LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, head_dim=12, sliding_window=None)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, rope_theta=1e6)),
    # Heads times their width is not the hidden size; the head is the word embeddings.
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True)),
}


def randomized(kind: type, config: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model


def decoder_state(theirs: Any) -> dict[str, torch.Tensor]:
    """Their weights by our names, the word embeddings left out."""
    return {
        key.removeprefix("model."): value
        for key, value in theirs.state_dict().items()
        if key != "model.embed_tokens.weight"
    }


def filled(shape: DecoderShape, state: dict[str, torch.Tensor]) -> LlamaDecoder:
    module = LlamaDecoder(shape).eval()
    module.load_state_dict(state)
    for name, value in rope_constants(shape).items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_cached_decode_are_transformers_own(name, tmp_path):
    """Ids with gaps, a hidden slot in the middle, then four tokens one by one."""
    theirs = randomized(*MODELS[name])
    shape = decoder_shape(theirs.config, tmp_path)
    state = decoder_state(theirs)
    assert shape.tied_embeddings == (name == "qwen3")
    ours = filled(shape, state)
    generator = torch.Generator().manual_seed(1)
    embeds = torch.randn(2, 11, shape.hidden_size, generator=generator)
    ids = torch.tensor([0, 1, 2, 5, 9, 30, 31, 40, 41, 42, 43]).expand(2, -1)
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, 3] = 0
    past = [torch.zeros(2, shape.num_key_value_heads, 0, shape.head_dim)] * 2 * shape.num_layers
    cache = None
    for start, end in ((0, 7), (7, 8), (8, 9), (9, 10), (10, 11)):
        step = embeds[:, start:end], mask[:, :end], ids[:, start:end]
        with torch.inference_mode():
            logits, *past = ours(*step, *past)
            answer = theirs(
                inputs_embeds=step[0],
                attention_mask=step[1],
                position_ids=step[2],
                past_key_values=cache,
                use_cache=True,
            )
        cache = answer.past_key_values
        assert logits.std() > 0.1
        torch.testing.assert_close(logits[:, 0], answer.logits[:, -1], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_token_that_counts_several_times_is_a_bias_of_its_log_in_transformers(name, tmp_path):
    """Their unpruned prompt, dropped tokens hidden, over prefill and four steps.

    Rows and columns of their mask are queries and keys, its numbers are added to scores.
    """
    theirs = randomized(*MODELS[name])
    shape = decoder_shape(theirs.config, tmp_path)
    state = decoder_state(theirs)
    ours = filled(shape, state)
    ours.proportional_attention = True
    length, generator = 18, torch.Generator().manual_seed(1)
    embeds = torch.randn(1, length, shape.hidden_size, generator=generator)
    counts = torch.tensor([1, 1, 0, 4, 0, 0, 3, 0, 7, 0, 1, 1, 1, 1, 1, 1, 1, 1])
    kept = torch.nonzero(counts)[:, 0]
    lowest = torch.finfo(torch.float32).min
    bias = torch.where(counts > 0, counts.clamp(min=1).log(), lowest).expand(length, -1)
    bias = bias.where(torch.ones(length, length).tril().bool(), lowest)
    with torch.inference_mode():
        truth = theirs(inputs_embeds=embeds, attention_mask=bias[None, None]).logits[0]
    past = [torch.zeros(1, shape.num_key_value_heads, 0, shape.head_dim)] * 2 * shape.num_layers
    first = len(kept) - 4
    for start, end in ((0, first), *((at, at + 1) for at in range(first, len(kept)))):
        now, so_far = kept[start:end], counts[kept[:end]][None]
        step = embeds[:, now], so_far, now[None]
        with torch.inference_mode():
            plain, *_ = filled(shape, state)(*step, *past)
            logits, *past = ours(*step, *past)
        torch.testing.assert_close(logits[0, 0], truth[now[-1]], atol=2e-5, rtol=1e-5)
        # Without the counts it is something else.
        assert (plain[0, 0] - truth[now[-1]]).abs().max() > 1e-2


SMALL = DecoderShape(
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=50,
    max_position_embeddings=256,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
)


def drawn(shape: DecoderShape) -> LlamaDecoder:
    generator = torch.Generator().manual_seed(0)
    state = LlamaDecoder(shape).state_dict()
    return filled(
        shape, {key: torch.randn(t.shape, generator=generator) * 0.3 for key, t in state.items()}
    )


def run(module: LlamaDecoder, embeds: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    batch, length = embeds.shape[:2]
    past = [torch.zeros(batch, 2, 0, 16)] * 2 * module.shape.num_layers
    with torch.inference_mode():
        return module(embeds, torch.ones(batch, length, dtype=torch.int64), ids, *past)[0]


@pytest.mark.parametrize(
    ("interleaved", "sections", "axes"),
    [
        (False, (2, 3, 3), (0, 0, 1, 1, 1, 2, 2, 2)),
        # Rows at 1, 4, columns at 2, 5; time has the others (Qwen3-VL).
        (True, (4, 2, 2), (0, 1, 2, 0, 1, 2, 0, 0)),
    ],
)
def test_axes_of_a_position_turn_their_own_frequencies(interleaved, sections, axes):
    """Checked against positions of one number, a frequency at a time."""
    shape = DecoderShape(
        **{**vars(SMALL), "rope_sections": sections, "rope_interleaved": interleaved}
    )
    assert shape.frequency_axes() == axes and shape.position_axes == 3
    generator = torch.Generator().manual_seed(2)
    embeds = torch.randn(2, 9, 32, generator=generator)
    ids = torch.randint(0, 40, (3, 2, 9), generator=generator)
    module, plain = drawn(shape), drawn(SMALL)
    same = ids[:1].expand(3, -1, -1)
    torch.testing.assert_close(run(module, embeds, same), run(plain, embeds, ids[0]))
    moved = run(module, embeds, ids)
    assert (moved - run(module, embeds, same)).abs().max() > 0.01
    for axis in range(3):
        # With only this axis' frequencies left, it is the only one that counts.
        for each in (module, plain):
            each.inv_freq = rope_constants(shape)["inv_freq"] * (torch.tensor(axes) == axis)
        torch.testing.assert_close(run(module, embeds, ids), run(plain, embeds, ids[axis]))


def test_taps_are_added_behind_their_layers():
    """A plane behind each of the first layers: what DeepStack needs; words bring none."""
    shape = DecoderShape(**{**vars(SMALL), "num_taps": 2})
    module = drawn(shape)
    generator = torch.Generator().manual_seed(3)
    embeds = torch.randn(1, 6, 96, generator=generator)
    ids = torch.arange(6)[None]
    added = []

    def add(_: Any, __: Any, output: Any) -> Any:
        plane = embeds[..., 32 * (len(added) + 1) : 32 * (len(added) + 2)].reshape(6, 32)
        added.append(plane)
        return (output[0] + plane, *output[1:])

    plain = drawn(SMALL)
    for layer in plain.layers[:2]:
        layer.register_forward_hook(add)
    torch.testing.assert_close(
        run(module, embeds, ids), run(plain, embeds[..., :32].contiguous(), ids)
    )
    assert len(added) == 2
    words = TokenEmbedding(shape)
    torch.nn.init.normal_(words.weight)
    found = words(torch.tensor([[3, 4]]))
    assert found.shape == (1, 2, 96) and not found[..., 32:].any() and found[..., :32].any()


def test_only_the_leading_channels_of_a_head_turn():
    shape = DecoderShape(**{**vars(SMALL), "rotary_dim": 4})
    heads = torch.randn(1, 2, 5, 16)
    inv_freq = rope_constants(shape)["inv_freq"]
    turned = rotate(heads, rope_rotation(torch.arange(5)[None], inv_freq, torch.float32), 4)
    assert torch.equal(turned[..., 4:], heads[..., 4:])
    lone = rotate(heads[..., :4], rope_rotation(torch.arange(5)[None], inv_freq, torch.float32))
    assert torch.equal(turned[..., :4], lone)


# By default tests/families/qwen_vl exports one, of a whole model.
@pytest.mark.full
def test_a_decoder_with_axes_norms_and_taps_is_exported(tmp_path):
    """All that Qwen3-VL has and Llama has not, through tracer, GapRemap and ONNX Runtime."""
    sizes = {"rope_sections": (4, 2, 2), "rope_interleaved": True, "qk_norm": True, "num_taps": 2}
    shape = DecoderShape(**{**vars(SMALL), **sizes, "attention_bias": "qkv", "num_layers": 4})
    module = drawn(shape)
    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    refs = index_files([tmp_path / "weights.safetensors"])
    weights = {decoder_key(key): refs[key] for key in refs}
    source: Any = SimpleNamespace(architecture=SimpleNamespace(decoder=shape), weights=weights)
    with torch.device("meta"):
        component = decoder_component(source, LLAMA, dtype="float32")
    placed = {key: place_reference(refs[key], "weights.safetensors") for key in refs}
    model = trace_component(component, placed=placed)
    run_pipeline(model, PIPELINES["decoder_model_merged"])
    save_graph(model, tmp_path / "decoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    caches = [value.name for value in session.get_inputs() if "past" in value.name]
    generator = np.random.default_rng(0)
    embeds = generator.standard_normal((2, 9, 96)).astype(np.float32)
    table = np.sort(generator.integers(0, 30, (3, 2, 8)), axis=2)
    # The last prompt token is text: the same id on all axes, and the largest.
    table[:, :, -1] = 40
    past = [np.zeros((2, 2, 0, 16), np.float32)] * len(caches)
    for start, end in ((0, 8), (8, 9)):
        slots = np.tile(np.arange(start, end), (2, 1))
        step = embeds[:, start:end], np.ones((2, end), np.int64)
        names = ("inputs_embeds", "attention_mask", "position_ids", "kept_positions", *caches)
        found = session.run(None, dict(zip(names, (*step, slots, table, *past), strict=True)))
        ids = gap_remap(slots, table)
        assert ids.shape == (3, 2, end - start)
        with torch.inference_mode():
            wanted = module(*map(torch.from_numpy, (*step, ids, *past)))
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=2e-5)
        past = found[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bias_blocks_to_the_bit_what_the_finite_minimum_in_its_place_would(dtype):
    """Zeros in the middle, padding on the left, a row that may see nothing, scores of any size."""
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1]])
    bias = key_bias(mask, num_queries=3, past=1)
    slots = torch.arange(4)
    allowed = (slots <= slots[1:, None]) & (mask != 0)[:, None, None]
    sizes = torch.tensor([-3e4, -20.0, -1e-3, 3e4])
    scores = torch.stack([sizes.roll(shift) for shift in range(3)]).to(dtype).expand(2, 1, 3, 4)
    biased = scores.to(torch.float32) + bias
    lowest = torch.finfo(torch.float32).min
    assert torch.equal(biased, torch.where(allowed, scores.to(torch.float32), lowest))
    assert not allowed[1, 0, 0].any()
    assert torch.equal(torch.softmax(biased, dim=-1)[1, 0, 0], torch.full((4,), 0.25))
