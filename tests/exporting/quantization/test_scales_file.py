"""What AWQ scaled channels by, in a file and out of it again."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from gap_export.errors import BundleError, CheckpointError
from gap_export.exporting.quantization import find_scales, read_scales, store_scales
from gap_export.progress import SilentProgress
from tests.exporting.quantization.small_decoder import build_decoder, draw_prompts

DECODER = "decoder_model_merged"
Q, V = (f"{DECODER}.layers.1.self_attn.{n}_proj.input_scale" for n in "qv")


@pytest.fixture(scope="module")
def component():
    return build_decoder(key_value_heads=4, loud=10.0)


@pytest.fixture(scope="module")
def scales(component):
    prompts = draw_prompts(key_value_heads=4)
    return find_scales(component, prompts, block_size=32, progress=SilentProgress())


@pytest.fixture
def file(scales, tmp_path):
    path = tmp_path / "awq.safetensors"
    store_scales(path, scales, of=DECODER)
    return path


def test_scales_are_read_as_they_were_found(component, scales, file):
    read = read_scales(file, component)
    assert [scale.group for scale in read] == [scale.group for scale in scales]
    for mine, theirs in zip(read, scales, strict=True):
        assert torch.equal(mine.scale, theirs.scale)


def test_every_linear_layer_has_its_own_by_its_name(component, file):
    held = load_file(file)
    layers = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up")
    names = {f"{DECODER}.layers.{i}.{n}_proj.input_scale" for i in range(2) for n in layers}
    names |= {f"{DECODER}.layers.{i}.mlp.down_proj.input_scale" for i in range(2)}
    assert held.keys() == names
    for name, scale in held.items():
        layer = name.removeprefix(f"{DECODER}.").removesuffix(".input_scale")
        assert scale.shape == component.weight_refs[f"{layer}.weight"].shape[1:]
        assert scale.dtype == torch.float32


def changed(file, **new):
    held = load_file(file)
    for name, values in new.items():
        held.pop(name)
        held |= {} if values is None else {name: values}
    save_file(held, file)
    return file


def test_a_layer_that_is_not_there_is_refused(component, file):
    with pytest.raises(BundleError, match=rf"does not belong.*missing {Q}; unknown none"):
        read_scales(changed(file, **{Q: None}), component)


def test_a_layer_too_many_is_refused(component, file):
    # Where heads share values, nothing is scaled between them and the layer behind.
    shared = build_decoder(key_value_heads=2)
    with pytest.raises(BundleError, match=r"unknown .*self_attn\.o_proj\.input_scale"):
        read_scales(file, shared)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda scale: scale[1:], r"F32 \[63\]; allowed: F32 \[64\]"),
        (lambda scale: scale.half(), r"F16 \[64\]; allowed: F32 \[64\]"),
        (lambda scale: -scale, "finite numbers above 0"),
        (lambda scale: scale * float("inf"), "finite numbers above 0"),
        (lambda scale: scale * float("nan"), "finite numbers above 0"),
    ],
)
def test_what_cannot_be_a_scale_is_refused_by_name(component, file, change, said):
    held = load_file(file)
    with pytest.raises(BundleError, match=said) as refused:
        read_scales(changed(file, **{Q: change(held[Q])}), component)
    assert Q in str(refused.value)


def test_layers_that_read_one_input_cannot_have_scales_of_their_own(component, file):
    with pytest.raises(BundleError, match=r"other numbers; allowed: those of layers\.1.*q_proj"):
        read_scales(changed(file, **{V: load_file(file)[V] * 2}), component)


def test_a_file_cut_short_is_damaged(component, file):
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError):
        read_scales(file, component)
