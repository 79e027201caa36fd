"""The decoder's form for ONNX Runtime against the base graph, and what makes the passes decline."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from gap_export.errors import PassError, UsageError
from gap_export.graph.id_readers import find_id_readers
from gap_export.graph.onnx_file import OnnxFile
from gap_export.graph.passes.give_more_logits import GiveMoreLogits
from gap_export.graph.passes.matching import qualified_name
from gap_export.graph.pipelines import lower
from gap_export.parity.compare import compare_arrays
from gap_export.runtime.backends.onnxruntime_backend import INPUT_DTYPES
from gap_export.runtime.backends.onnxruntime_in_place import InPlaceDecoder
from gap_export.spec.tolerances import TOLERANCES
from tests.graph.lowering_models import DECODERS, FAMILIES, NUM_LAYERS, LoweringModels, session
from tests.graph.test_lowering import DECODER, PROMPT, STEPS, Decode

ATTENTION, ROTARY = "com.microsoft::GroupQueryAttention", "com.microsoft::RotaryEmbedding"


def decoder_of(
    lowering_models: LoweringModels, family: str, dtype: str, model: ir.Model | None = None
) -> InPlaceDecoder:
    lowered = lower(model or lowering_models.base(family, DECODER, dtype), DECODER, "ort")
    runner = session(lowering_models.save(lowered, f"{DECODER}_ort", family, dtype))
    dtypes = {value.name: INPUT_DTYPES[value.type] for value in runner.get_inputs()}
    shape = FAMILIES[family].decoder_shape
    size = shape.num_key_value_heads, shape.head_dim, shape.vocab_size
    return InPlaceDecoder(runner, "cpu", dtypes, size)


def run_in_place(
    decoder: InPlaceDecoder, case: Decode, *, kept: np.ndarray | None = None, cuts: Any = ()
) -> np.ndarray:
    """Logits float32 [steps, B, V]; the prompt in one go, or cut before some tokens."""
    cache, logits = decoder.new_cache(2, PROMPT + STEPS), []
    ends = [*cuts, *range(PROMPT, PROMPT + STEPS + 1)]
    for start, end in zip([0, *ends], ends, strict=False):
        feed = {
            "inputs_embeds": case.embeds[:, start:end],
            "attention_mask": case.mask[:, :end],
            "position_ids": case.slots[:, start:end],
            "kept_positions": case.kept if kept is None else kept,
        }
        logits.append(decoder.decode(feed, cache).astype(np.float32))
    return np.stack(logits[len(cuts) :])


def check_close(reference: np.ndarray, candidate: np.ndarray, dtype: str) -> None:
    tolerance = TOLERANCES[dtype]["logits"]
    atol = tolerance.absolute(float(np.abs(reference).max()))
    found = compare_arrays(reference, candidate, atol=atol, rtol=tolerance.rtol)
    assert found.passed, found


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, "float16") for family in ("llava", "llava_next", "interleaved")),
        ("llava_next", "float32"),
        ("proportional", "float16"),
        ("proportional", "float32"),
        pytest.param("chunked", "float16", marks=pytest.mark.full),
        *(
            pytest.param(family, "float32", marks=pytest.mark.full)
            for family in ("llava", "interleaved", "chunked")
        ),
    ],
)
def test_decoder_gives_what_the_base_graph_gives_whatever_is_hidden(lowering_models, family, dtype):
    """One row is padded on the left, one has zeros in the middle of its mask."""
    case = Decode(family)
    base = lowering_models.save(
        lowering_models.base(family, DECODER, dtype), DECODER, family, dtype
    )
    wanted, _ = case.run(base, dtype=np.dtype(dtype).type)
    decoder = decoder_of(lowering_models, family, dtype)
    check_close(wanted, run_in_place(decoder, case), dtype)
    # A prompt may come in parts, of which some rows have nothing but padding.
    check_close(wanted, run_in_place(decoder, case, cuts=(8, 13)), dtype)
    for axis in range(len(case.kept) if case.kept.ndim == 3 else 1):
        kept = case.kept.copy()
        kept[axis if kept.ndim == 3 else ...] = np.arange(PROMPT)
        with pytest.raises(AssertionError):
            check_close(wanted, run_in_place(decoder, case, kept=kept), dtype)


def test_a_token_hidden_later_is_as_if_it_had_been_hidden(lowering_models):
    family, case = "llava_next", Decode("llava_next")
    base = lowering_models.base(family, DECODER, "float32")
    decoder = decoder_of(lowering_models, family, "float32")
    case.mask[:] = 1
    case.slots = np.tile(np.arange(PROMPT + STEPS), (2, 1))
    hidden = case.mask.copy()
    hidden[0, [3, PROMPT]], hidden[1, 18:20] = 0, 0
    feed = {"kept_positions": case.kept}
    runner = session(lowering_models.save(base, DECODER, family, "float32"))
    cache = decoder.new_cache(2, PROMPT + STEPS)
    caches = [v for v in runner.get_inputs() if v.name.startswith("past")]
    growing = {v.name: np.zeros((2, v.shape[1], 0, v.shape[3]), np.float32) for v in caches}
    for start, end in ((0, PROMPT), (PROMPT, PROMPT + 1), (PROMPT + 1, PROMPT + 2)):
        feed |= {
            "inputs_embeds": case.embeds[:, start:end].astype(np.float32),
            "attention_mask": (case.mask if end <= PROMPT + 1 else hidden)[:, :end],
            "position_ids": case.slots[:, start:end],
        }
        logits, *present = runner.run(None, feed | growing)
        growing = dict(zip(growing, present, strict=True))
        check_close(logits[:, 0], decoder.decode(feed, cache), "float32")
    # What was hidden is gone.
    step = {**feed, "attention_mask": np.ones((2, PROMPT + 3), np.int64)}
    with pytest.raises(UsageError, match="shows a token that it hid before"):
        decoder.decode(step, cache)


def test_each_of_the_last_tokens_has_its_logits(lowering_models):
    decoder, case = decoder_of(lowering_models, "llava_next", "float32"), Decode("llava_next")
    assert decoder.num_logits == 8
    case.mask[:] = 1
    slots = np.arange(PROMPT + STEPS)[None]
    given = {"kept_positions": case.kept[..., :1, :]}

    def decode(start: int, end: int, cache: Any, run: Any) -> np.ndarray:
        feed = {
            "inputs_embeds": case.embeds[:1, start:end],
            "attention_mask": case.mask[:1, :end],
            "position_ids": slots[:, start:end],
        }
        return run(feed | given, cache)

    one_by_one = decoder.new_cache(1, PROMPT + STEPS)
    wanted = [decode(0, PROMPT, one_by_one, decoder.decode)]
    wanted += [decode(t, t + 1, one_by_one, decoder.decode) for t in range(PROMPT, PROMPT + STEPS)]
    cache = decoder.new_cache(1, PROMPT + STEPS)
    check_close(wanted[0], decode(0, PROMPT, cache, decoder.decode), "float32")
    found = decode(PROMPT, PROMPT + STEPS, cache, decoder.decode_each)
    check_close(np.concatenate(wanted[1:]), found, "float32")


def test_a_head_of_another_form_keeps_its_one_token(lowering_models):
    model = lowering_models.base("llava_next", DECODER, "float32").clone()
    (logits,) = (value for value in model.graph.outputs if value.name == "logits")
    head = logits.producer().inputs[0]
    doubled = ir.Value(name="doubled", type=head.type, shape=head.shape)
    node = ir.node("Add", [head, head], outputs=[doubled])
    model.graph.insert_before(logits.producer(), node)
    logits.producer().replace_input_with(0, doubled)
    assert not GiveMoreLogits(count=8).run(model)


def test_a_fork_goes_on_as_its_source_would(lowering_models):
    decoder, case = decoder_of(lowering_models, "llava_next", "float32"), Decode("llava_next")
    cache = decoder.new_cache(1, PROMPT)
    feed = {
        "inputs_embeds": case.embeds[:1, :PROMPT],
        "attention_mask": case.mask[:1, :PROMPT],
        "position_ids": case.slots[:1, :PROMPT],
        "kept_positions": case.kept[:1],
    }
    decoder.decode(feed, cache)
    forked = decoder.fork_cache(cache, 2, PROMPT + 1)
    step = {
        "inputs_embeds": np.repeat(case.embeds[:1, PROMPT : PROMPT + 1], 2, axis=0),
        "attention_mask": np.repeat(case.mask[:1, : PROMPT + 1], 2, axis=0),
        "position_ids": np.repeat(case.slots[:1, PROMPT : PROMPT + 1], 2, axis=0),
        "kept_positions": np.repeat(case.kept[:1], 2, axis=0),
    }
    both = decoder.decode(step, forked)
    truth = run_in_place(decoder, case)[1, 0]
    for row in both:
        check_close(truth, row, "float32")
    step["attention_mask"] = np.ones((2, PROMPT + 2), np.int64)
    with pytest.raises(UsageError, match=r"more tokens than the cache was made for: 22; .*<= 21"):
        decoder.decode(step, forked)


@pytest.mark.parametrize("family", DECODERS)
def test_all_layers_are_fused_and_rotation_reads_the_ids_of_gap_remap(lowering_models, family):
    base = lowering_models.base(family, DECODER)
    lowered = lower(base, DECODER, "ort")
    found = Counter(qualified_name(node) for node in lowered.graph)
    assert (found[ATTENTION], found[ROTARY]) == (NUM_LAYERS, 2 * NUM_LAYERS)
    assert not {"Softmax", "Where", "Reciprocal"} & set(found)
    # Nothing is transposed but the ids of several axes.
    assert found["Transpose"] == len(base.graph.inputs[3].shape) - 2
    for node in lowered.graph:
        if node.op_type == "GroupQueryAttention":
            assert node.attributes["do_rotary"].as_int() == 0
    readers = find_id_readers(OnnxFile.read(lowering_models.save(lowered, "read", family)))
    assert len(readers) == 2 + 2 * NUM_LAYERS


def test_another_mask_is_refused(lowering_models):
    model = lowering_models.base("llava", DECODER).clone()
    (order,) = (node for node in model.graph if node.op_type == "LessOrEqual")
    # Windows of slots begin so.
    order.op_type = "Less"
    with pytest.raises(PassError, match="masked in another way"):
        lower(model, DECODER, "ort")


def test_int4_weights_survive(lowering_models):
    family, case = "llava_next", Decode("llava_next")
    model = lowering_models.base(family, DECODER).clone()
    lowering_models.quantize(model, family, "ort_int4")
    wanted, _ = case.run(lowering_models.save(model, f"{DECODER}_int4", family))
    decoder = decoder_of(lowering_models, family, "float16", model)
    check_close(wanted, run_in_place(decoder, case), "float16")
