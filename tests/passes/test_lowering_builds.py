"""Each form of each component as TensorRT-RTX parses and builds it, without a GPU, for SM 89."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest

from gap_export.passes import LOWERINGS, DecoderLimits, lower
from tests.passes.lowering_models import COMPONENTS, MAX_POSITIONS

trt = pytest.importorskip("tensorrt_rtx", reason="needs the extra trt-rtx")

DECODER = "decoder_model_merged"
LIMITS = DecoderLimits(max_position_embeddings=MAX_POSITIONS, cache_capacity=48)
# Named dimension: smallest, usual and largest length of the profile.
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


class Log(trt.ILogger):
    """Keeps errors; a machine without a driver gives one line about it at every start."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.ERROR:
            self.errors.append(message)


def build(path: Path) -> bytes:
    """A plan, with a profile for prefill, and one for decode where there is a cache."""
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        pytest.fail("; ".join(parser.get_error(i).desc() for i in range(parser.num_errors)))
    config = builder.create_builder_config()
    inputs = onnx.load(path, load_external_data=False).graph.input
    cached = any(value.name.startswith("past_key_values") for value in inputs)
    for lengths in (PREFILL, DECODE) if cached else (PREFILL,):
        profile = builder.create_optimization_profile()
        for value in inputs:
            dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            shapes = [[lengths[d][i] if isinstance(d, str) else d for d in dims] for i in range(3)]
            profile.set_shape(value.name, *shapes)
        config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        pytest.fail("; ".join(log.errors))
    return bytes(plan)


@pytest.mark.parametrize("form", LOWERINGS)
@pytest.mark.parametrize(("family", "component"), COMPONENTS)
def test_form_builds_for_a_desktop_gpu(lowering_models, family, component, form):
    model = lower(lowering_models.base(family, component), component, form, limits=LIMITS)
    path = lowering_models.save(model, f"{component}_{form}", family)
    onnx.checker.check_model(str(path))
    assert len(build(path)) > 1000


@pytest.mark.parametrize("form", LOWERINGS)
def test_int4_decoder_builds(lowering_models, form):
    model = lowering_models.base("llava_next", DECODER).clone()
    lowering_models.quantize(model, "llava_next", f"{form}_built_int4")
    model = lower(model, DECODER, form, limits=LIMITS)
    assert len(build(lowering_models.save(model, f"{DECODER}_{form}_int4", "llava_next"))) > 1000


@pytest.mark.full
@pytest.mark.parametrize("form", LOWERINGS)
def test_bfloat16_decoder_builds(lowering_models, form):
    """ONNX Runtime has no kernels for it on a CPU, so that this is all that can be asked."""
    model = lower(
        lowering_models.base("llava_next", DECODER, "bfloat16"), DECODER, form, limits=LIMITS
    )
    path = lowering_models.save(model, f"{DECODER}_{form}", "llava_next", "bfloat16")
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
