"""Manifests, an image, and a backend of a few lines of numpy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gap_export.runtime.session import GroundingSession
from gap_export.spec.manifest import Manifest, TensorPlace, TextEncoderSpec, TilesSpec
from tests.runtime.fake_backends import FakeBackend

MakeBackend = Callable[[Manifest], FakeBackend]


@pytest.fixture
def make_backend() -> MakeBackend:
    return FakeBackend


@pytest.fixture
def make_session(
    make_backend: MakeBackend, tokenizer_folder: Path
) -> Callable[..., GroundingSession]:
    """Sessions on a backend in numpy; options are those of GroundingSession."""

    def make(manifest: Manifest, **options: Any) -> GroundingSession:
        return GroundingSession(manifest, tokenizer_folder, make_backend(manifest), **options)

    return make


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
    """As sample_manifest, with images cut into two or four tiles of 32 px."""
    return _tiled(sample_manifest)


@pytest.fixture
def stacked_manifest(tiled_manifest: Manifest) -> Manifest:
    """As tiled_manifest, for tiles of 32 px that are stacked: no newline, one to six of them."""
    sizes = ((32, 32), (64, 32), (32, 64), (96, 64), (64, 96))
    image = dataclasses.replace(
        tiled_manifest.image, preparation="dynamic_tiles", tiles=TilesSpec(resolutions=sizes)
    )
    return dataclasses.replace(tiled_manifest, image=image, newline=None)


@pytest.fixture
def tiled_text_manifest(text_manifest: Manifest) -> Manifest:
    """As tiled_manifest, with a pruner that reads the text."""
    return _tiled(text_manifest)


@pytest.fixture
def image() -> Any:
    """Wide: uint8 [24, 40, 3], so that padding matters."""
    return np.random.default_rng(3).integers(0, 256, size=(24, 40, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stamps of bundles opened here stay out of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The graph and the options of every session that ONNX Runtime starts."""
    from gap_export.runtime.backends.quiet_onnxruntime import ort

    seen: list[tuple[str, Any]] = []
    real = ort.InferenceSession

    def start(path: str, options: Any, **given: Any) -> Any:
        seen.append((path, options))
        return real(path, options, **given)

    monkeypatch.setattr(ort, "InferenceSession", start)
    return seen
