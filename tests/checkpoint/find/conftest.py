"""A cache of the hub in place of this machine's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

WHOLE = {"config.json": b"{}", "model.safetensors": b"", "tokenizer.json": b""}
CacheRepository = Callable[..., Path]


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, and of torch, in place of this machine's."""
    from huggingface_hub import constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return cache


@pytest.fixture
def cache_repository(hub_cache: Path) -> CacheRepository:
    """Puts a repository into the cache as the hub's own client does: blobs, links, a ref."""

    def cache(hub_id: str, files: dict[str, bytes] | None = None, *, kind: str = "model") -> Path:
        folder = hub_cache / f"{kind}s--{hub_id.replace('/', '--')}"
        snapshot = folder / "snapshots" / "0123abcd"
        for place in (snapshot, folder / "blobs", folder / "refs"):
            place.mkdir(parents=True)
        (folder / "refs" / "main").write_text("0123abcd")
        for name, content in (files or WHOLE).items():
            (folder / "blobs" / f"blob-{name}").write_bytes(content)
            (snapshot / name).symlink_to(
                os.path.relpath(folder / "blobs" / f"blob-{name}", snapshot)
            )
        return snapshot

    return cache


def folder_with(path: Path, *names: str) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name in names:
        (path / name).write_bytes(b"{}")
    return path
