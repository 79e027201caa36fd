"""The reference's own dtype: what is fed to its modules, and what numpy gets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gap_export.exporting.torch_backend import TorchBackend
from gap_export.parity.replay import RecordingBackend, replay
from gap_export.spec.manifest import DecoderSpec

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


def reference(dtype: str) -> Any:
    kind = DTYPES[dtype]
    return SimpleNamespace(
        dtype=dtype,
        vision_encoder=Vision(kind),
        text_encoder=None,
        embed_tokens=torch.nn.Embedding(9, 4).to(kind),
        decoder=Decoder(kind),
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


def decode(backend: Any, embeds: Any) -> Any:
    size = embeds.shape[1]
    return backend.decode(
        inputs_embeds=embeds,
        attention_mask=np.ones((1, size), np.int64),
        position_ids=np.arange(size)[None],
        kept_positions=np.arange(size)[None],
        cache=backend.new_cache(1),
    )


@EVERY
def test_floats_go_in_and_come_out_in_the_reference_s_dtype(dtype: str) -> None:
    backend = TorchBackend(reference(dtype))
    pixels = np.full((2, 3, 2, 2), 1 / 3, np.float32)
    features, keep, _ = backend.encode_image(pixels, None)
    assert (features.dtype, keep.dtype) == (NUMPY[dtype], np.int64)
    with_text, *_ = backend.encode_image(pixels, np.ones((2, 4), np.float32))
    np.testing.assert_allclose(with_text, features + 1, rtol=1e-2)
    embeds = backend.embed_tokens(np.asarray([[1, 2, 3]]))
    assert embeds.dtype == NUMPY[dtype]
    logits = decode(backend, embeds)
    assert (logits.dtype, logits.shape) == (NUMPY[dtype], (1, 4))
    np.testing.assert_allclose(logits, embeds[:, -1] * 3, rtol=1e-2)


@EVERY
def test_newline_is_an_output_like_others(dtype: str) -> None:
    recorder = RecordingBackend(TorchBackend(reference(dtype)))
    newline = recorder.image_newline()
    assert newline.dtype == NUMPY[dtype]
    np.testing.assert_allclose(newline, [0, 1 / 3, 2 / 3, 1], atol=1e-2)
    (call,) = recorder.calls
    assert (call.method, call.inputs) == ("image_newline", {})
    assert (call.outputs["image_newline"] == newline).all()
    (replayed,) = replay(recorder.calls, TorchBackend(reference(dtype)))
    assert (replayed["image_newline"] == newline).all()


@pytest.mark.parametrize("pruner", ["divprune", "cdpruner", "spatial", "cls"])
def test_margins_of_a_choice_are_those_of_pruners_that_choose_one_by_one(tiny_graphs, pruner):
    built = tiny_graphs.reference(pruner)
    rng = np.random.default_rng(0)
    image = tiny_graphs.recipe.image
    pixels = rng.normal(size=(1, 3, image.height, image.width)).astype(np.float32)
    given: list[Any] = [pixels, None]
    if pruner == "cdpruner":
        ids = np.arange(1, 4, dtype=np.int64)[None]
        given[1] = TorchBackend(built).encode_text(ids)
    backend = TorchBackend(built)
    recorder = RecordingBackend(backend, margins=backend.margins)
    recorder.encode_image(*given)
    (call,) = recorder.calls
    if pruner in {"spatial", "cls"}:
        assert call.margins is None
    else:
        assert call.margins.dtype == np.float32 and call.margins.shape == (1,)
        assert 0 <= call.margins[0] < 2
