"""Each form of each component as TensorRT-RTX parses and builds it, without a GPU, for SM 89."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from gap_export.graph.pipelines import DecoderLimits, lower
from tests.engines.sm89 import build_plan
from tests.graph.lowering_models import COMPONENTS, MAX_POSITIONS
from tests.graph.test_lowering import ENGINE_FORMS

DECODER = "decoder_model_merged"
LIMITS = DecoderLimits(max_position_embeddings=MAX_POSITIONS, cache_capacity=48)
PREFILL = {
    "num_images": (1, 1, 2),
    "batch_size": (1, 1, 2),
    "sequence_length": (1, 16, 32),
    "past_sequence_length": (0, 0, 0),
    "total_sequence_length": (1, 16, 32),
    "prompt_length": (1, 16, 32),
    "text_length": (1, 8, 16),
}
DECODE = {
    **PREFILL,
    "sequence_length": (1, 1, 1),
    "past_sequence_length": (1, 16, 47),
    "total_sequence_length": (2, 17, 48),
}


def build(path: Path) -> bytes:
    """A plan, with a profile for prefill, and one for decode where there is a cache."""
    inputs = onnx.load(path, load_external_data=False).graph.input
    cached = any(value.name.startswith("past_key_values") for value in inputs)
    return build_plan(path, *((PREFILL, DECODE) if cached else (PREFILL,)))


@pytest.mark.parametrize("form", ENGINE_FORMS)
@pytest.mark.parametrize(("family", "component"), COMPONENTS)
def test_form_builds_for_a_desktop_gpu(lowering_models, family, component, form):
    model = lower(lowering_models.base(family, component), component, form, limits=LIMITS)
    path = lowering_models.save(model, f"{component}_{form}", family)
    onnx.checker.check_model(str(path))
    assert len(build(path)) > 1000


@pytest.mark.parametrize("form", ENGINE_FORMS)
@pytest.mark.parametrize("family", ["llava_next", "interleaved"])
def test_int4_decoder_builds(lowering_models, family, form):
    model = lowering_models.base(family, DECODER).clone()
    lowering_models.quantize(model, family, f"{form}_built_int4")
    model = lower(model, DECODER, form, limits=LIMITS)
    assert len(build(lowering_models.save(model, f"{DECODER}_{form}_int4", family))) > 1000


@pytest.mark.full
@pytest.mark.parametrize("form", ENGINE_FORMS)
@pytest.mark.parametrize("family", ["llava_next", "interleaved"])
def test_bfloat16_decoder_builds(lowering_models, family, form):
    """ONNX Runtime has no kernels for it on a CPU, so that this is all that can be asked."""
    model = lower(lowering_models.base(family, DECODER, "bfloat16"), DECODER, form, limits=LIMITS)
    path = lowering_models.save(model, f"{DECODER}_{form}", family, "bfloat16")
    assert len(build(path)) > 1000


def test_a_cache_of_symbolic_capacity_does_not_build(lowering_models):
    """Why the pass asks for a number: TensorRT refuses the graph that ONNX would allow."""
    model = lower(lowering_models.base("llava", DECODER), DECODER, "fused", limits=LIMITS)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.name.startswith(("past_key_values", "present")):
            value.shape = ir.Shape(
                ["cache_capacity" if axis == 2 else dim for axis, dim in enumerate(value.shape)]
            )
    path = lowering_models.save(model, f"{DECODER}_symbolic", "llava")
    with pytest.raises(pytest.fail.Exception, match="static sequence length"):
        build(path)
