"""A small finished bundle, and a cache of stamps that is the test's own."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gap_export.bundle import write_bundle
from gap_export.bundle.files import HASH_NAME, hash_line
from gap_export.spec.manifest import MANIFEST_NAME, Manifest

WriteSample = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def write_sample(sample_manifest: Manifest, tmp_path: Path) -> WriteSample:
    """Writes a bundle of three files: a graph, copied weights, and one in a sub-folder."""
    source = tmp_path / "source.safetensors"
    source.write_bytes(bytes(range(256)) * 10)

    def write(out: Path, *, force: bool = False, graph: bytes = b"a graph") -> Path:
        with write_bundle(out, force=force) as draft:
            draft.place(source, "model.safetensors", hold="copy")
            (draft.folder / "embed_tokens.onnx").write_bytes(graph)
            (draft.folder / "sub").mkdir()
            (draft.folder / "sub" / "tokenizer.json").write_bytes(b"{}")
            draft.commit(sample_manifest)
        return out

    return write


@pytest.fixture
def bundle(write_sample: WriteSample, tmp_path: Path) -> Path:
    return write_sample(tmp_path / "sample-bundle")


@pytest.fixture
def rewrite_manifest() -> Callable[..., None]:
    """Changes a bundle's manifest and its hash, as a forger would."""

    def rewrite(bundle: Path, manifest: Manifest | bytes, **changes: Any) -> None:
        if isinstance(manifest, Manifest):
            manifest = dataclasses.replace(manifest, **changes).to_json()
        (bundle / MANIFEST_NAME).write_bytes(manifest)
        (bundle / HASH_NAME).write_bytes(hash_line(manifest))

    return rewrite


@pytest.fixture
def foreign_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "holiday"
    folder.mkdir()
    (folder / "diary.txt").write_text("dear diary")
    return folder


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    def copy(bundle: Path) -> Path:
        return Path(shutil.copytree(bundle, tmp_path / "copied-bundle"))

    return copy
