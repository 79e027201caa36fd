"""Bundles whose graphs TensorRT can build, and a cache that is the test's own."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from gap_export.bundle import Bundle, open_bundle, write_bundle
from gap_export.spec.manifest import GraphSpec, Manifest, TensorSpec
from tests.engines.bundles import SKIP_RTX, SM89, copy_for_engines, for_engines
from tests.shared import SharedFolder

OneGraphBundle = Callable[..., Bundle]


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Stamps and timing caches of the test alone."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "gap-export"


@pytest.fixture
def trt_bundle(tiny_text_bundle: Path, tmp_path: Path) -> Bundle:
    """The tiny model with the pruner that reads the expression: four graphs, none built."""
    return copy_for_engines(tiny_text_bundle, tmp_path / "trt")


@pytest.fixture(scope="session")
def built_bundle(tiny_text_bundle: Path, shared: SharedFolder) -> Bundle:
    """As :func:`trt_bundle`, built for SM 89. Read only."""
    pytest.importorskip("tensorrt_rtx", reason=SKIP_RTX)
    from gap_export.engines.build import build_engines

    def build(out: Path) -> None:
        build_engines(copy_for_engines(tiny_text_bundle, out), SM89)

    return open_bundle(shared.once("built", build))


@pytest.fixture
def one_graph_bundle(sample_manifest: Manifest, tmp_path: Path) -> OneGraphBundle:
    """Makes a bundle of one graph, called embed_tokens."""

    def make(
        model: Any, *, dtype: str = "float32", files: Mapping[str, bytes] = MappingProxyType({})
    ) -> Bundle:
        def specs(values: Any) -> tuple[TensorSpec, ...]:
            names = {1: "float32", 7: "int64", 10: "float16"}
            return tuple(
                TensorSpec(
                    name=value.name,
                    dtype=names[value.type.tensor_type.elem_type],
                    shape=tuple(
                        d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim
                    ),
                )
                for value in values
            )

        graph = GraphSpec(
            component="embed_tokens",
            lowering="onnxruntime",
            dtype=dtype,
            kv_contract="none",
            file="embed_tokens.onnx",
            inputs=specs(model.graph.input),
            outputs=specs(model.graph.output),
        )
        manifest = dataclasses.replace(sample_manifest, dtype=dtype, graphs=(graph,))
        out = tmp_path / "one-graph"
        with write_bundle(out) as draft:
            (draft.folder / graph.file).write_bytes(model.SerializeToString())
            for name, content in files.items():
                (draft.folder / name).write_bytes(content)
            draft.commit(for_engines(manifest))
        return open_bundle(out)

    return make


@pytest.fixture
def full_tensorrt(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The full TensorRT 10.3 of an Orin, as far as TensorRT-RTX can stand in for it.

    It has no builder that writes to a stream, and builds for the GPU at hand, an SM 87 here.
    """
    rtx = pytest.importorskip("tensorrt_rtx", reason=SKIP_RTX)
    from gap_export.engines import build
    from gap_export.engines.device import Gpu

    class Builder:
        def __init__(self, logger: Any) -> None:
            self._real = rtx.Builder(logger)
            self.create_network = self._real.create_network
            self.create_optimization_profile = self._real.create_optimization_profile
            self.build_serialized_network = self._real.build_serialized_network

        def create_builder_config(self) -> Any:
            config = self._real.create_builder_config()
            config.num_compute_capabilities = 1
            config.set_compute_capability(rtx.ComputeCapability.SM86, 0)
            return config

    def attribute(name: str) -> Any:
        return getattr(rtx, name)

    module = types.ModuleType("tensorrt")
    module.__version__ = "10.3.0"  # type: ignore[attr-defined]
    module.Builder = Builder  # type: ignore[attr-defined]
    module.__getattr__ = attribute  # type: ignore[method-assign]
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", module)
    gpu = Gpu(name="Orin", compute_capability=87, memory_bytes=8 << 30, integrated=True)
    monkeypatch.setattr(build, "find_gpu", lambda: gpu)
    return module
