"""A backend in a few lines of numpy, whose answers depend on ids, masks and order."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pytest

from gap_export.spec.manifest import Manifest, TensorPlace, TextEncoderSpec, TilesSpec
from gap_export.spec.positions import gap_remap


@dataclass
class FakeCache:
    """Everything fed so far: [B, T, H] and the ids RoPE would have seen, [B, T]."""

    batch_size: int
    embeds: Any = None
    ids: Any = None

    @property
    def length(self) -> int:
        return 0 if self.embeds is None else int(self.embeds.shape[1])


@dataclass
class FakeBackend:
    """One layer of "attention" by relative position; counts calls and remembers ids."""

    manifest: Manifest
    closed: bool = False
    calls: list[str] = field(default_factory=list)
    ids_seen: list[Any] = field(default_factory=list)
    name: str = "numpy"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        rng = np.random.default_rng(7)
        spec = self.manifest.decoder
        self._table = rng.normal(size=(spec.vocab_size, spec.hidden_size)).astype(np.float32)
        self._head = rng.normal(size=(spec.hidden_size, spec.vocab_size)).astype(np.float32)

    def __enter__(self) -> FakeBackend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.closed = True

    def encode_text(self, input_ids: Any) -> Any:
        self.calls.append(f"encode_text {list(input_ids.shape)}")
        return self._table[input_ids].mean(axis=1)

    def encode_image(self, pixel_values: Any, text_embeds: Any) -> tuple[Any, Any]:
        self.calls.append("encode_image")
        pruning = self.manifest.pruning
        emitted, hidden = pruning.num_emitted_tokens, self.manifest.decoder.hidden_size
        keep = np.arange(emitted, dtype=np.int64)[None].repeat(len(pixel_values), axis=0) * 3
        means = pixel_values.mean(axis=(1, 2, 3))[:, None]
        features = np.tanh(means + np.arange(emitted * hidden, dtype=np.float32))
        features = features.reshape(-1, emitted, hidden).astype(np.float32)
        if text_embeds is not None:
            shift = (np.abs(text_embeds).sum(axis=1) * 10).astype(np.int64) % 2
            keep = keep + shift[:, None]
            features = features + text_embeds[:, None, :]
        return features, keep

    def image_newline(self) -> Any:
        assert self.manifest.newline is not None
        return np.full(self.manifest.decoder.hidden_size, 0.5, np.float32)

    def embed_tokens(self, input_ids: Any) -> Any:
        return self._table[input_ids]

    def new_cache(self, batch_size: int) -> FakeCache:
        return FakeCache(batch_size)

    def decode(
        self,
        *,
        inputs_embeds: Any,
        attention_mask: Any,
        position_ids: Any,
        kept_positions: Any,
        cache: Any,
    ) -> Any:
        self.calls.append(f"decode {list(inputs_embeds.shape[:2])}")
        ids = gap_remap(position_ids, kept_positions)
        self.ids_seen.append(ids)
        first = cache.embeds is None
        cache.embeds = inputs_embeds if first else np.concatenate([cache.embeds, inputs_embeds], 1)
        cache.ids = ids if first else np.concatenate([cache.ids, ids], 1)
        assert attention_mask.shape == cache.ids.shape
        distance = (cache.ids[:, -1:] - cache.ids).astype(np.float64)
        weights = (np.cos(0.3 * distance) + 1.1) * attention_mask
        mixed = np.einsum("bt,bth->bh", weights, np.tanh(cache.embeds))
        return (mixed @ self._head).astype(np.float32)


MakeBackend = Callable[[Manifest], FakeBackend]


@pytest.fixture
def make_backend() -> MakeBackend:
    return FakeBackend


@pytest.fixture
def text_manifest(sample_manifest: Manifest) -> Manifest:
    """As sample_manifest, with a pruner that reads the text."""
    return dataclasses.replace(
        sample_manifest,
        text_encoder=TextEncoderSpec(
            template="{expression}", tokenizer_file="clip/tokenizer.json", max_tokens=7
        ),
    )


def _tiled(manifest: Manifest) -> Manifest:
    image = dataclasses.replace(
        manifest.image,
        preparation="anyres",
        pad_color=(0, 0, 0),
        tiles=TilesSpec(resolutions=((32, 64), (64, 32), (64, 64))),
    )
    return dataclasses.replace(
        manifest,
        image=image,
        decoder=dataclasses.replace(manifest.decoder, max_position_embeddings=256),
        box=dataclasses.replace(manifest.box, frame="image"),
        newline=TensorPlace(file="model.safetensors", offset=0, dtype="float32", shape=(8,)),
    )


@pytest.fixture
def tiled_manifest(sample_manifest: Manifest) -> Manifest:
    """As sample_manifest, with pictures cut into two or four tiles of 32 px."""
    return _tiled(sample_manifest)


@pytest.fixture
def tiled_text_manifest(text_manifest: Manifest) -> Manifest:
    """As tiled_manifest, with a pruner that reads the text."""
    return _tiled(text_manifest)


@pytest.fixture
def picture() -> Any:
    """Wide: uint8 [24, 40, 3], so that padding matters."""
    return np.random.default_rng(3).integers(0, 256, size=(24, 40, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stamps of bundles opened here stay out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
