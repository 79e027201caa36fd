"""Scaled channels: the same floats, less lost by rounding; against a slow search of our own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gap_export.checkpoint.weights import quantize_columns
from gap_export.exporting.quantization import find_scales, linear_keys, loaded, scale_channels
from gap_export.exporting.quantization.calibration import observe_inputs
from gap_export.progress import SilentProgress
from gap_export.spec.tolerances import TOLERANCES
from tests.exporting.quantization.small_decoder import build_decoder, draw_prompts

DECODER = "decoder_model_merged"


def find(component, prompts, block_size: int = 32):
    return find_scales(component, prompts, block_size=block_size, progress=SilentProgress())


def scaled(component, scales):
    """The component with the scales folded in."""
    from dataclasses import replace

    from gap_export.families import Reference

    nothing: Any = SimpleNamespace()
    reference = Reference(
        components=(component,),
        dtype="float32",
        decoder_spec=nothing,
        text_encoder_spec=None,
        image_token_id=None,
        newline_weight=None,
        assets={},
        checkpoint_files=(),
    )
    result = scale_channels(reference, scales, of=DECODER).component(DECODER)
    assert replace(result, weight_refs=component.weight_refs) == component
    return result


def logits(component, prompts, *, rounded: bool = False) -> torch.Tensor:
    with loaded(component), torch.inference_mode():
        for key in linear_keys(component, lm_head=False) if rounded else ():
            layer = component.module.get_submodule(key.removesuffix(".weight"))
            steps, factors = quantize_columns(layer.weight, block_size=32)
            values = (steps * factors).reshape(layer.weight.shape)
            layer.weight = torch.nn.Parameter(values, requires_grad=False)
        return torch.cat([component.module(*prompt)[0] for prompt in prompts])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("key_value_heads", [2, 4])
def test_floats_compute_the_same_once_scaled(key_value_heads, bias):
    prompts = draw_prompts(key_value_heads=key_value_heads)
    component = build_decoder(key_value_heads=key_value_heads, bias=bias, loud=20.0)
    scales = find(component, prompts)
    assert any(found.alpha > 0 for found in scales)
    after = scaled(component, scales)
    changed = {key for key, ref in after.weight_refs.items() if component.weight_refs[key] != ref}
    assert changed
    tolerance = TOLERANCES["float32"]["logits"]
    torch.testing.assert_close(
        logits(after, prompts), logits(component, prompts), atol=tolerance.atol, rtol=tolerance.rtol
    )


def test_scales_between_heads_are_left_out_where_heads_share_values():
    readers = {}
    for heads in (2, 4):
        found = find(build_decoder(key_value_heads=heads), draw_prompts(key_value_heads=heads))
        readers[heads] = [scale.group.readers for scale in found]
    outputs = [("layers.0.self_attn.o_proj",), ("layers.1.self_attn.o_proj",)]
    assert [names for names in readers[4] if names not in readers[2]] == outputs
    assert len(readers[2]) == 6


def test_loud_channels_are_scaled_and_less_is_lost():
    prompts = draw_prompts()
    component = build_decoder(loud=10.0)
    scales = find(component, prompts)
    assert all(found.error <= found.plain_error for found in scales)
    first = scales[0]
    assert first.group.producer == "layers.0.input_layernorm"
    assert first.alpha > 0
    assert first.error < 0.7 * first.plain_error
    loud = torch.zeros(64, dtype=torch.bool)
    loud[::8] = True
    assert float(first.scale[loud].min()) > float(first.scale[~loud].max())
    # Not only layer by layer: the decoder answers nearer, too, also on other prompts. Those of
    # a few prompts alone tell nothing, attention with random weights is too fickle.
    fresh = [prompt for seed in range(1, 17) for prompt in draw_prompts(seed=seed)]
    exact = logits(component, fresh)
    plain = (logits(component, fresh, rounded=True) - exact).norm()
    awq = (logits(scaled(component, scales), fresh, rounded=True) - exact).norm()
    assert float(awq) < 0.9 * float(plain)


def test_search_finds_what_a_slow_one_in_numpy_does():
    prompts = draw_prompts()
    component = build_decoder(loud=5.0)
    found = {scale.group.readers: scale for scale in find(component, prompts)}
    readers = ("layers.1.mlp.gate_proj", "layers.1.mlp.up_proj")
    seen = observe_inputs(component, readers[:1], prompts)[readers[0]]
    rows = seen.rows.double().numpy()
    size = np.abs(rows).mean(axis=0)
    errors = []
    for alpha in np.arange(11) / 10:
        scale = np.clip(size, size.max() * 1e-4, None) ** alpha
        scale /= np.sqrt(scale.max() * scale.min())
        error = whole = 0.0
        for name in readers:
            weight = component.weight_refs[f"{name}.weight"].load().double().numpy()
            blocks = (weight * scale).reshape(len(weight), -1, 32)
            step = np.abs(blocks).max(axis=2, keepdims=True) / 7
            rounded = (np.round(blocks / step) * step).reshape(weight.shape) / scale
            error += float(((rows @ (rounded - weight).T) ** 2).sum())
            whole += float(((rows @ weight.T) ** 2).sum())
        errors.append(error / whole)
    best = found[readers]
    assert best.alpha == pytest.approx(np.argmin(errors) / 10)
    # Our steps are rounded to 8 bits, the slow ones are not.
    assert best.error == pytest.approx(min(errors), rel=0.02)
    assert best.plain_error == pytest.approx(errors[0], rel=0.02)


def test_silent_inputs_are_left_alone():
    prompts = draw_prompts()
    silent = [(torch.zeros_like(prompt[0]), *prompt[1:]) for prompt in prompts]
    scales = find(build_decoder(), silent)
    assert [scale.alpha for scale in scales] == [0.0] * len(scales)
    assert all(torch.isfinite(scale.scale).all() for scale in scales)


def test_channels_that_are_never_used_stay_within_float16():
    prompts = draw_prompts()
    component = build_decoder()
    quiet = [prompt[0].clone() for prompt in prompts]
    for embeds in quiet:
        embeds[..., 5] = 0.0
    scales = find(component, [(e, *p[1:]) for e, p in zip(quiet, prompts, strict=True)])
    for found in scales:
        assert 0.009 < float(found.scale.min()) <= float(found.scale.max()) < 110
