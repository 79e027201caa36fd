"""The reference's own dtype: what is fed to its modules, and what numpy gets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gap_export.exporting.torch_backend import TorchBackend
from gap_export.families import Component
from gap_export.parity.replay import RecordingBackend, replay
from gap_export.spec.manifest import DecoderSpec, TensorSpec

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.float32}
EVERY = pytest.mark.parametrize("dtype", list(DTYPES))


class Vision(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, pixel_values: Any, text_embeds: Any = None) -> Any:
        assert pixel_values.dtype == torch.float32
        features = pixel_values.flatten(1)[:, None, :4].to(self.dtype)
        if text_embeds is not None:
            assert text_embeds.dtype == self.dtype
            features = features + text_embeds[:, None]
        return features, torch.zeros(len(pixel_values), 1, dtype=torch.int64)


class Decoder(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, embeds: Any, mask: Any, positions: Any, key: Any, value: Any) -> Any:
        assert {embeds.dtype, key.dtype, value.dtype} == {self.dtype}
        assert (mask.dtype, positions.dtype) == (torch.int64, torch.int64)
        new = embeds[:, None]
        return embeds * 3, torch.cat([key, new], 2), torch.cat([value, new], 2)


def component(name: str, module: torch.nn.Module, inputs: str, outputs: str) -> Component:
    """One whose tensors are ``name:dtype`` each."""
    ins, outs = (
        tuple(
            TensorSpec(name=each.split(":")[0], dtype=each.split(":")[1], shape=("batch_size",))
            for each in tensors.split()
        )
        for tensors in (inputs, outputs)
    )
    return Component(
        name=name, module=module, inputs=ins, outputs=outs,
        example_sizes={}, weight_refs={}, constants={},
    )  # fmt: skip


def reference(dtype: str, *, reads_text: bool = False) -> Any:
    kind = DTYPES[dtype]
    past, present = "past_key_values.0", "present.0"
    components = (
        component(
            "vision_encoder",
            Vision(kind),
            "pixel_values:float32" + reads_text * f" text_embeds:{dtype}",
            f"image_features:{dtype} keep_indices:int64",
        ),
        component(
            "embed_tokens",
            torch.nn.Embedding(9, 4).to(kind),
            "input_ids:int64",
            f"inputs_embeds:{dtype}",
        ),
        component(
            "decoder_model_merged",
            Decoder(kind),
            f"inputs_embeds:{dtype} attention_mask:int64 position_ids:int64 "
            f"{past}.key:{dtype} {past}.value:{dtype}",
            f"logits:{dtype} {present}.key:{dtype} {present}.value:{dtype}",
        ),
    )
    return SimpleNamespace(
        dtype=dtype,
        component=lambda name: next(each for each in components if each.name == name),
        newline=torch.linspace(0, 1, 4).to(kind),
        decoder_spec=DecoderSpec(
            num_layers=1,
            num_key_value_heads=1,
            head_dim=4,
            hidden_size=4,
            vocab_size=4,
            max_position_embeddings=64,
            eos_token_ids=(2,),
        ),
    )


@EVERY
def test_floats_go_in_and_come_out_in_the_reference_s_dtype(dtype):
    backend = TorchBackend(reference(dtype))
    feed = {"pixel_values": np.full((2, 3, 2, 2), 1 / 3, np.float32)}
    seen = backend.run("vision_encoder", feed)
    features = seen["image_features"]
    assert (features.dtype, seen["keep_indices"].dtype) == (NUMPY[dtype], np.int64)
    feed["text_embeds"] = np.ones((2, 4), np.float32)
    reading = TorchBackend(reference(dtype, reads_text=True))
    with_text = reading.run("vision_encoder", feed)["image_features"]
    np.testing.assert_allclose(with_text, features + 1, rtol=1e-2)
    ids = np.asarray([[1, 2, 3]])
    embeds = backend.run("embed_tokens", {"input_ids": ids})["inputs_embeds"]
    assert embeds.dtype == NUMPY[dtype]
    slots = np.arange(3)[None]
    prompt = {
        "inputs_embeds": embeds,
        "attention_mask": np.ones((1, 3), np.int64),
        "position_ids": slots,
        "kept_positions": slots,
    }
    cache = backend.new_cache(1, 3)
    logits = backend.decode(prompt, cache)
    assert (cache.length, logits.dtype, logits.shape) == (3, NUMPY[dtype], (1, 4))
    np.testing.assert_allclose(logits, embeds[:, -1] * 3, rtol=1e-2)


@EVERY
def test_newline_is_an_output_like_others(dtype):
    recorder = RecordingBackend(TorchBackend(reference(dtype)))
    newline = recorder.run("newline", {})["image_newline"]
    assert newline.dtype == NUMPY[dtype]
    np.testing.assert_allclose(newline, [0, 1 / 3, 2 / 3, 1], atol=1e-2)
    (call,) = recorder.calls
    assert (call.component, call.inputs) == ("newline", {})
    assert (call.outputs["image_newline"] == newline).all()
    (replayed,) = replay(recorder.calls, TorchBackend(reference(dtype)))
    assert (replayed["image_newline"] == newline).all()


@pytest.mark.parametrize("pruner", ["divprune", "cdpruner", "spatial", "cls"])
def test_margins_of_a_choice_are_those_of_pruners_that_choose_one_by_one(tiny_graphs, pruner):
    built = tiny_graphs.reference(pruner)
    rng = np.random.default_rng(0)
    image = tiny_graphs.recipe.image
    pixels = rng.normal(size=(1, 3, image.height, image.width)).astype(np.float32)
    feed = {"pixel_values": pixels}
    if pruner == "cdpruner":
        ids = np.arange(1, 4, dtype=np.int64)[None]
        feed |= TorchBackend(built).run("text_encoder", {"input_ids": ids})
    backend = TorchBackend(built)
    recorder = RecordingBackend(backend, margins=backend.margins)
    recorder.run("vision_encoder", feed)
    (call,) = recorder.calls
    if pruner in {"spatial", "cls"}:
        assert call.margins is None
    else:
        assert call.margins.dtype == np.float32 and call.margins.shape == (1,)
        assert 0 <= call.margins[0] < 2
