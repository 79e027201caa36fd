"""Estimates of memory, and the peak of a piece of work."""

from __future__ import annotations

import dataclasses
import math

import pytest

from gap_export.engines.build import target_graphs
from gap_export.engines.device import Gpu, free_memory
from gap_export.engines.memory import (
    MemoryEstimate,
    estimate_memory,
    memory_warnings,
    peak_bytes,
    reset_peak,
    weight_bytes,
)
from gap_export.engines.targets import TARGETS
from tests.engines.bundles import LIMITS

GIB = 1 << 30
ESTIMATE = MemoryEstimate(
    weights=8 * GIB, largest_weights=6 * GIB, kv_cache=1 * GIB, activations=GIB // 2
)
ORIN = Gpu(name="Orin", compute_capability=87, memory_bytes=8 * GIB, integrated=True)


def test_weights_are_those_of_the_graphs(trt_bundle):
    from safetensors import safe_open

    graph = trt_bundle.manifest.graph("embed_tokens")
    with safe_open(trt_bundle.file("model.safetensors"), "numpy") as file:
        (name,) = [key for key in file.keys() if key.endswith("embed_tokens.weight")]  # noqa: SIM118
        wanted = math.prod(file.get_slice(name).get_shape()) * 4
    assert weight_bytes(trt_bundle, graph) == wanted


def test_the_cache_is_that_of_the_largest_batch_at_full_length(trt_bundle):
    graphs = target_graphs(trt_bundle.manifest, TARGETS["rtx"])
    decoder = trt_bundle.manifest.decoder
    found = estimate_memory(trt_bundle, graphs, LIMITS)
    slots = LIMITS.max_batch * (LIMITS.max_prompt + LIMITS.max_new_tokens)
    width = decoder.num_key_value_heads * decoder.head_dim
    assert found.kv_cache == 2 * decoder.num_layers * width * slots * 4
    assert found.weights == sum(weight_bytes(trt_bundle, graph) for graph in graphs)
    assert found.largest_weights < found.weights
    assert found.activations > 0
    assert found.running == found.weights + found.kv_cache + found.activations
    more = estimate_memory(trt_bundle, graphs, dataclasses.replace(LIMITS, max_batch=4))
    assert more.kv_cache == 2 * found.kv_cache


def test_attention_is_of_as_many_heads_as_the_manifest_says(trt_bundle):
    """In Qwen3-VL-4B they are 32, and hidden_size / head_dim is 20."""
    graphs = target_graphs(trt_bundle.manifest, TARGETS["rtx"])
    decoder = trt_bundle.manifest.decoder
    by_width = decoder.hidden_size // decoder.head_dim
    wide = dataclasses.replace(decoder, num_heads=by_width + 12)
    manifest = dataclasses.replace(trt_bundle.manifest, decoder=wide)
    found = estimate_memory(dataclasses.replace(trt_bundle, manifest=manifest), graphs, LIMITS)
    before = estimate_memory(trt_bundle, graphs, LIMITS)
    scores = 12 * LIMITS.max_batch * LIMITS.max_prompt**2 * 4
    assert found.activations - before.activations == scores


def test_nothing_is_said_where_memory_will_do():
    gpu = dataclasses.replace(ORIN, memory_bytes=24 * GIB)
    assert memory_warnings(ESTIMATE, gpu=gpu, free_host=24 * GIB) == ()
    assert memory_warnings(ESTIMATE, gpu=None, free_host=None) == ()


def test_too_little_memory_is_said_with_what_takes_it():
    building, running = memory_warnings(ESTIMATE, gpu=ORIN, free_host=8 * GIB)
    assert building.startswith("building takes about 18.50 GiB, 8.00 GiB are free")
    assert "running takes about 9.50 GiB (weights 8.00 GiB, KV cache 1.00 GiB" in running
    assert "Orin has 8.00 GiB" in running and "--dtype int4" in running


def test_the_peak_is_that_of_the_work_since():
    reset_peak()
    before = peak_bytes()
    block = bytearray(64 << 20)
    assert peak_bytes() - before >= 60 << 20
    del block
    assert peak_bytes() - before >= 60 << 20


def test_free_memory_is_what_the_system_says(monkeypatch, tmp_path):
    assert free_memory() is None or free_memory() > 0
    from gap_export.engines import device

    info = tmp_path / "meminfo"
    info.write_text("MemTotal:       1000 kB\nMemAvailable:    500 kB\n")
    monkeypatch.setattr(device, "_MEMINFO", info)
    assert free_memory() == 500 * 1024
    info.write_text("MemTotal: 1000 kB\n")
    assert free_memory() is None
    monkeypatch.setattr(device, "_MEMINFO", tmp_path / "missing")
    assert free_memory() is None


@pytest.mark.parametrize("integrated", [False, True])
def test_a_gpu_is_asked_through_its_driver(monkeypatch, integrated):
    import ctypes

    from gap_export.engines import device

    class Driver:
        """cuda.h's functions, of an SM 87 with 8 GiB."""

        def __init__(self, name: str) -> None:
            assert name == "libcuda.so.1"

        def cuInit(self, *_):  # noqa: N802
            return 0

        cuDeviceGet = cuInit  # noqa: N815

        def cuDeviceGetName(self, text, *_):  # noqa: N802
            text.value = b"Orin"

        def cuDeviceTotalMem_v2(self, place, *_):  # noqa: N802
            place._obj.value = 8 * GIB

        def cuDeviceGetAttribute(self, place, attribute, *_):  # noqa: N802
            place._obj.value = {75: 8, 76: 7, 18: int(integrated)}[attribute]

    monkeypatch.setattr(ctypes, "CDLL", Driver)
    monkeypatch.setattr(device, "free_memory", lambda: 3 * GIB)
    gpu = device.find_gpu()
    assert gpu is not None
    assert (gpu.name, gpu.compute_capability, gpu.integrated) == ("Orin", 87, integrated)
    assert gpu.memory_bytes == (3 if integrated else 8) * GIB
    monkeypatch.setattr(Driver, "cuInit", lambda self, flags: 100)
    assert device.find_gpu() is None

    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert device.find_gpu() is None
