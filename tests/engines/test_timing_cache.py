"""What was measured is kept for the same TensorRT on the same GPU, and never does harm."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from gap_export.engines.library import TensorRT
from gap_export.engines.timing_cache import keep_timing_cache, use_timing_cache

FULL = TensorRT(name="tensorrt", module=None, version="10.3.0")


class Cache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> memoryview:
        return memoryview(self.content)


class Config:
    """An IBuilderConfig, as far as timing caches go."""

    def __init__(self, fits: bool = True) -> None:
        self.fits = fits
        self.cache: Cache | None = None

    def create_timing_cache(self, content: bytes) -> Cache | None:
        return None if content == b"nonsense" else Cache(content)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.content and not self.fits:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache | None:
        return self.cache


def keep(content: bytes, library: TensorRT = FULL, capability: int | None = 87) -> None:
    config = Config()
    config.cache = Cache(content)
    keep_timing_cache(library, config, capability)


def found(library: TensorRT = FULL, capability: int | None = 87, fits: bool = True) -> Any:
    config = Config(fits)
    use_timing_cache(library, config, capability)
    return None if config.cache is None else config.cache.content


@pytest.fixture
def folder(cache_folder: Path) -> Path:
    return cache_folder / "timing"


def test_what_was_kept_is_found():
    assert found() == b""
    keep(b"measured")
    assert found() == b"measured"


def test_another_version_or_gpu_finds_nothing():
    keep(b"measured")
    assert found(TensorRT(name="tensorrt", module=None, version="10.3.1")) == b""
    assert found(capability=110) == b""


def test_an_unknown_gpu_keeps_nothing(folder):
    keep(b"measured", capability=None)
    assert not folder.exists()
    assert found(capability=None) is None


def test_a_library_that_measures_nothing_is_left_alone(folder):
    rtx = TensorRT(name="tensorrt_rtx", module=None, version="1.7.1.116")
    keep(b"measured", rtx, 89)
    assert not folder.exists()
    assert found(rtx, 89) is None


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: b"", lambda raw: b"x" + raw])
def test_a_damaged_cache_is_left_out_with_a_message(folder, caplog, damage):
    keep(b"measured")
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.INFO, logger="gap_export"):
        assert found() == b""
    assert "is damaged and is left out" in caplog.text


@pytest.mark.parametrize(("content", "fits"), [(b"nonsense", True), (b"measured", False)])
def test_a_cache_tensorrt_does_not_want_is_left_out_with_a_message(caplog, content, fits):
    keep(content)
    with caplog.at_level(logging.INFO, logger="gap_export"):
        assert found(fits=fits) == b""
    assert "does not fit and is left out" in caplog.text


def test_a_cache_that_cannot_be_read_or_written_costs_time_only(folder, caplog):
    name = "tensorrt-10.3.0-sm87.cache"
    (folder / name).mkdir(parents=True)
    with caplog.at_level(logging.INFO, logger="gap_export"):
        assert found() == b""
        keep(b"measured")
    assert "cannot be read" in caplog.text and "not written" in caplog.text
    assert [path.name for path in folder.iterdir()] == [name]
