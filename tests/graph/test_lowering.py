"""Each form of each component against the untouched graph, in ONNX Runtime, and as a plan."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from gap_export.errors import PassError
from gap_export.graph.passes.graph_pass import fingerprint
from gap_export.graph.pipelines import (
    FUSED_OPERATORS,
    LOWERINGS,
    PORTABLE_OPERATORS,
    DecoderLimits,
    lower,
)
from gap_export.parity.compare import compare_arrays
from gap_export.spec.positions import slots_from_mask
from gap_export.spec.tolerances import TOLERANCES
from tests.graph.lowering_models import (
    COMPONENTS,
    DECODERS,
    FAMILIES,
    MAX_POSITIONS,
    NUM_LAYERS,
    LoweringModels,
    kinds,
    session,
)

DECODER = "decoder_model_merged"
CAPACITY = 48
# The form for ONNX Runtime has tests of its own.
ENGINE_FORMS = ("portable", "fused")
LIMITS = DecoderLimits(max_position_embeddings=MAX_POSITIONS, cache_capacity=CAPACITY)
PROMPT, STEPS = 20, 3
PLAIN = [case for case in COMPONENTS if DECODER not in getattr(case, "values", case)]


def feeds_of(model: ir.Model) -> dict[str, np.ndarray]:
    """What a component other than the decoder takes: two rows, drawn."""
    rng = np.random.default_rng(0)
    feeds = {}
    for value in model.graph.inputs:
        shape = [dim if isinstance(dim, int) else 2 for dim in value.shape]
        if value.dtype == ir.DataType.INT64:
            feeds[value.name] = rng.integers(0, 79, (2, 9))
            # The text tower looks for its end of text.
            feeds[value.name][:, 6] = 79
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(value.dtype.numpy())
    return feeds


def outputs(
    lowering_models: LoweringModels, model: ir.Model, name: str, family: str
) -> dict[str, Any]:
    runner = session(lowering_models.save(model, name, family))
    names = [value.name for value in runner.get_outputs()]
    return dict(zip(names, runner.run(None, feeds_of(model)), strict=True))


def check_close(name: str, reference: np.ndarray, candidate: np.ndarray) -> None:
    tolerance = TOLERANCES["float16"][name]
    atol = tolerance.atol + tolerance.largest_fraction * float(np.abs(reference).max())
    found = compare_arrays(reference, candidate, atol=atol, rtol=tolerance.rtol)
    assert found.passed, (name, found)


@pytest.mark.parametrize("form", ENGINE_FORMS)
@pytest.mark.parametrize(("family", "component"), PLAIN)
def test_component_gives_what_the_base_graph_gives(lowering_models, family, component, form):
    base = lowering_models.base(family, component)
    wanted = outputs(lowering_models, base, component, family)
    lowered = lower(base, component, form)
    found = outputs(lowering_models, lowered, f"{component}_{form}", family)
    assert list(found) == list(wanted)
    if component != "vision_encoder":
        ((name, truth),) = wanted.items()
        check_close(name, truth, found[name])
        return
    keeps, candidates = wanted["keep_indices"], found["keep_indices"]
    truth, features = wanted["image_features"], found["image_features"]
    assert truth.shape == features.shape
    for row, (keep, other) in enumerate(zip(keeps, candidates, strict=True)):
        common = sorted(set(keep) & set(other))
        # As the tolerance of keep_indices has it for so few tokens.
        assert len(common) >= len(keep) - 1
        places = [list(keep).index(i) for i in common], [list(other).index(i) for i in common]
        check_close("image_features", truth[row, places[0]], features[row, places[1]])


class Decode:
    """A padded batch: a prompt, then three steps; ids go up to 3,900."""

    def __init__(self, family: str) -> None:
        rng = np.random.default_rng(1)
        total, shape = PROMPT + STEPS, FAMILIES[family].decoder_shape
        self.embeds = (rng.standard_normal((2, total, shape.embeds_size)) / 2).astype(np.float16)
        self.mask = np.ones((2, total), np.int64)
        self.mask[1, :6] = 0
        # Hidden in the middle, as the oracle of the design has dropped tokens.
        self.mask[0, 9:11] = 0
        self.slots = slots_from_mask(self.mask)
        if FAMILIES[family].attention == "proportional":
            self.mask *= rng.integers(1, 6, self.mask.shape)
        rows = [
            np.sort(rng.choice(3900, PROMPT, replace=False)) for _ in range(2 * shape.position_axes)
        ]
        axes = (shape.position_axes,) if shape.position_axes > 1 else ()
        self.kept = np.stack(rows).reshape(*axes, 2, PROMPT)

    def run(
        self, path: Any, *, dtype: type = np.float16, kept: np.ndarray | None = None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Logits float32 [steps, B, V], and the caches after the last step."""
        runner = session(path)
        caches = {
            value.name: np.full(
                [dim if isinstance(dim, int) else size for dim, size in zip(
                    value.shape, (2, 0, 0, 0), strict=True)],
                np.nan, dtype)
            for value in runner.get_inputs() if value.name.startswith("past_key_values")
        }  # fmt: skip
        names = [value.name for value in runner.get_outputs()]
        logits = []
        for start, end in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, PROMPT + STEPS))]:
            feeds = {
                "inputs_embeds": self.embeds[:, start:end].astype(dtype),
                "attention_mask": self.mask[:, :end],
                "position_ids": self.slots[:, start:end],
                "kept_positions": self.kept if kept is None else kept,
            }
            found = dict(zip(names, runner.run(None, {**feeds, **caches}), strict=True))
            logits.append(found.pop("logits").astype(np.float32)[:, 0])
            caches = {
                name.replace("present", "past_key_values"): cache for name, cache in found.items()
            }
        return np.stack(logits), caches


@pytest.mark.parametrize("form", ENGINE_FORMS)
@pytest.mark.parametrize("family", DECODERS)
def test_decoder_gives_what_the_base_graph_gives_over_prefill_and_decode(
    lowering_models, family, form
):
    decode = Decode(family)
    base = lowering_models.base(family, DECODER)
    wanted, caches = decode.run(lowering_models.save(base, DECODER, family))
    lowered = lowering_models.save(
        lower(base, DECODER, form, limits=LIMITS), f"{DECODER}_{form}", family
    )
    # Buffers begin as NaN: what lies beyond the slots in use is never looked at.
    found, present = decode.run(lowered)
    assert wanted.shape == (STEPS + 1, 2, 100)
    check_close("logits", wanted, found)
    used = decode.mask.astype(bool)
    for name, cache in caches.items():
        mine = present[name][:, :, : PROMPT + STEPS].swapaxes(1, 2)[used]
        check_close("logits", cache.swapaxes(1, 2)[used], mine)
    # The comparison can fail: other ids give other logits.
    # With several axes each is seen by itself.
    for axis in range(len(decode.kept) if decode.kept.ndim == 3 else 1):
        kept = decode.kept.copy()
        kept[axis if kept.ndim == 3 else ...] = np.arange(PROMPT)
        compact, _ = decode.run(lowered, kept=kept)
        with pytest.raises(AssertionError):
            check_close("logits", wanted, compact)


def test_fused_decoder_is_as_far_from_float32_as_the_base_graph(lowering_models):
    """Where it rounds is another place, how often is not more."""
    family = "llava_next"
    decode = Decode(family)
    exact = lowering_models.save(
        lowering_models.base(family, DECODER, "float32"), DECODER, family, "float32"
    )
    truth, _ = decode.run(exact, dtype=np.float32)
    lowered = lower(lowering_models.base(family, DECODER), DECODER, "fused", limits=LIMITS)
    found, _ = decode.run(lowering_models.save(lowered, f"{DECODER}_fused", family))
    check_close("logits", truth, found)


@pytest.mark.parametrize("form", ENGINE_FORMS)
@pytest.mark.parametrize(("family", "component"), COMPONENTS)
def test_interface_stays_but_for_the_cache(lowering_models, family, component, form):
    base = lowering_models.base(family, component)
    lowered = lower(base, component, form, limits=LIMITS)
    in_place = LOWERINGS[form].kv_contract == "in_place"
    pairs = [
        *zip(base.graph.inputs, lowered.graph.inputs, strict=True),
        *zip(base.graph.outputs, lowered.graph.outputs, strict=True),
    ]
    for old, new in pairs:
        assert (new.name, new.dtype) == (old.name, old.dtype)
        shape = [dim if isinstance(dim, int) else str(dim) for dim in old.shape]
        if in_place and old.name.startswith(("past_key_values", "present")):
            shape[2] = CAPACITY
        assert [dim if isinstance(dim, int) else str(dim) for dim in new.shape] == shape


@pytest.mark.parametrize("form", ENGINE_FORMS)
@pytest.mark.parametrize(("family", "component"), COMPONENTS)
def test_lowering_leaves_the_given_model_and_reads_no_weight(
    lowering_models, family, component, form
):
    base = lowering_models.base(family, component)
    before = fingerprint(base)
    lowered = lower(base, component, form, limits=LIMITS)
    assert fingerprint(base) == before
    operators = FUSED_OPERATORS if form == "fused" else PORTABLE_OPERATORS
    assert set(kinds(lowered)) - {"GapRemap"} <= operators
    opset = 24 if form == "fused" else 20
    assert (lowered.opset_imports[""], lowered.ir_version) == (opset, 10)
    for name, value in lowered.graph.initializers.items():
        known = base.graph.initializers.get(name)
        if isinstance(known and known.const_value, ir.ExternalTensor):
            assert value.const_value is known.const_value
    lost = [
        name
        for name, value in base.graph.initializers.items()
        if isinstance(value.const_value, ir.ExternalTensor)
        and name not in lowered.graph.initializers
    ]
    assert lost == []


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_fused_decoder_feeds_rotary_from_gap_remap(lowering_models, family):
    graph = lower(lowering_models.base(family, DECODER), DECODER, "fused", limits=LIMITS).graph
    turned = [node for node in graph if node.op_type == "RotaryEmbedding"]
    assert len(turned) == 2 * NUM_LAYERS
    for node in turned:
        x, cos, sin, ids = node.inputs
        assert (ids.producer().domain, ids.producer().op_type) == ("gap_export", "GapRemap")
        assert list(cos.shape) == list(sin.shape) == [MAX_POSITIONS, 8]
        assert x.shape[3] == 16
    (remap,) = (node for node in graph if node.op_type == "GapRemap")
    assert [value.name for value in remap.inputs] == ["position_ids", "kept_positions"]


@pytest.mark.parametrize(
    ("family", "norms"),
    [("interleaved", 4), pytest.param("chunked", 2, marks=pytest.mark.full)],
)
def test_fused_decoder_of_three_axes_has_one_cosine_a_token_and_all_its_norms(
    lowering_models, family, norms
):
    graph = lower(lowering_models.base(family, DECODER), DECODER, "fused", limits=LIMITS).graph
    found = Counter(node.op_type for node in graph)
    # Of a layer, of queries and keys where they have one, and before the head.
    assert found["RMSNormalization"] == norms * NUM_LAYERS + 1
    assert (found["Cos"], found["Sin"], found["RotaryEmbedding"]) == (1, 1, 2 * NUM_LAYERS)
    for node in graph:
        if node.op_type == "RotaryEmbedding":
            # No ids, and no table of all positions: rows of cos and sin, from ids that are exact.
            assert [len(value.shape) for value in node.inputs] == [4, 3, 3]
            product = node.inputs[1].producer().inputs[0].producer().inputs[0].producer()
            numbers = product.inputs[0].producer()
            assert (product.op_type, numbers.inputs[0].dtype) == ("Mul", ir.DataType.INT64)
            chosen = numbers.inputs[0].producer().inputs[0].producer()
            assert chosen.inputs[0].producer().op_type == "GapRemap"
            assert product.inputs[1].dtype == ir.DataType.FLOAT


def test_a_norm_of_queries_that_is_not_fused_is_refused(lowering_models):
    model = lowering_models.base("interleaved", DECODER).clone()
    weight = model.graph.initializers["layers.1.self_attn.q_norm.weight"]
    ((mul, _),) = weight.uses()
    # What the norm gives is scaled twice: the second scale stays outside of it.
    twice = ir.node("Mul", [mul.outputs[0], weight], name="twice")
    twice.outputs[0].name = "twice"
    twice.outputs[0].type, twice.outputs[0].shape = mul.outputs[0].type, mul.outputs[0].shape
    mul.outputs[0].replace_all_uses_with(twice.outputs[0])
    twice.replace_input_with(0, mul.outputs[0])
    model.graph.insert_after(mul, twice)
    with pytest.raises(PassError, match=r"a norm of the decoder was not fused: .*q_norm\.weight"):
        lower(model, DECODER, "fused", limits=LIMITS)


def test_only_attention_whose_weights_a_pruner_reads_is_left(lowering_models):
    found = {
        family: kinds(
            lower(lowering_models.base(family, "vision_encoder"), "vision_encoder", "fused")
        )
        for family in ("llava", "llava_next", "minigpt_v2")
    }
    assert {name: ops.count("Softmax") for name, ops in found.items()} == {
        "llava": 0, "llava_next": 1, "minigpt_v2": 0,
    }  # fmt: skip
    assert found["llava_next"].count("Attention") == 1


def test_shared_heads_are_not_repeated_in_the_fused_decoder(lowering_models):
    before = lowering_models.base("llava_next", DECODER)
    graph = lower(before, DECODER, "fused", limits=LIMITS).graph
    assert kinds(before).count("Expand") == 2 * NUM_LAYERS
    for node in graph:
        if node.op_type == "Attention":
            assert [value.shape[1] for value in node.inputs[:3]] == [4, 2, 2]


def test_float32_is_refused_by_the_fused_form(lowering_models):
    model = lowering_models.base("llava_next", DECODER, "float32")
    with pytest.raises(PassError, match=r"dtype: float32; allowed: float16, bfloat16; .*--dtype"):
        lower(model, DECODER, "fused", limits=LIMITS)
    lower(model, DECODER, "portable")


def test_fused_decoder_without_limits_is_refused(lowering_models):
    with pytest.raises(PassError, match="max_position_embeddings and cache_capacity"):
        lower(lowering_models.base("llava", DECODER), DECODER, "fused")


@pytest.mark.parametrize(
    ("component", "form", "message"),
    [
        (DECODER, "molten", "no such lowering: molten; allowed: portable, fused"),
        ("encoder", "portable", "no such component: encoder; allowed: vision_encoder"),
    ],
)
def test_unknown_names_are_refused(lowering_models, component, form, message):
    with pytest.raises(PassError, match=message):
        lower(lowering_models.base("llava", DECODER), component, form, limits=LIMITS)


def test_lowering_twice_is_refused_or_changes_nothing(lowering_models):
    base = lowering_models.base("llava_next", "vision_encoder")
    for form in ENGINE_FORMS:
        once = lower(base, "vision_encoder", form)
        assert fingerprint(lower(once, "vision_encoder", form)) == fingerprint(once)
    once = lower(lowering_models.base("llava", DECODER), DECODER, "fused", limits=LIMITS)
    assert fingerprint(lower(once, DECODER, "fused", limits=LIMITS)) == fingerprint(once)
    with pytest.raises(PassError, match="opset is not one of the portable form: 24"):
        lower(once, DECODER, "portable")


def test_a_layer_that_lost_its_norm_is_not_taken_for_fused(lowering_models):
    model = lowering_models.base("llava", DECODER).clone()
    (last,) = (
        node for node in model.graph if model.graph.initializers["norm.weight"] in node.inputs
    )
    plain = next(value for value in last.inputs if not value.is_initializer())
    last.outputs[0].replace_all_uses_with(plain)
    model.graph.remove(last, safe=True)
    with pytest.raises(PassError):
        lower(model, DECODER, "fused", limits=LIMITS)


@pytest.mark.parametrize("form", ENGINE_FORMS)
@pytest.mark.parametrize("family", ["llava_next", "interleaved"])
def test_int4_weights_survive_lowering(lowering_models, family, form):
    """DequantizeLinear and MatMul stand where Gemm stood; no pass looks at either."""
    model = lowering_models.base(family, DECODER).clone()
    quantized = lowering_models.quantize(model, family, f"{form}_int4")
    decode = Decode(family)
    wanted, _ = decode.run(lowering_models.save(model, f"{DECODER}_int4", family))
    lowered = lower(model, DECODER, form, limits=LIMITS)
    assert lowered.opset_imports[""] == (24 if form == "fused" else 21)
    assert kinds(lowered).count("DequantizeLinear") == quantized == 7 * NUM_LAYERS
    found, _ = decode.run(lowering_models.save(lowered, f"{DECODER}_{form}_int4", family))
    check_close("logits", wanted, found)
