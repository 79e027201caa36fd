"""Bundles that engines can be built from, made of ordinary ones, and graphs of one node."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gap_export.bundle import Bundle, open_bundle, write_bundle
from gap_export.engines.targets import TARGETS, TargetChoice
from gap_export.spec.manifest import EngineLimits, GraphSpec, Manifest, TargetSpec

LIMITS = EngineLimits(max_prompt=40, max_new_tokens=8, max_batch=2, max_images=2)
SM89 = TargetChoice(target=TARGETS["rtx"], compute_capability=89)
SM86 = TargetChoice(target=TARGETS["rtx"], compute_capability=86)
SKIP_RTX = "TensorRT-RTX is not installed: it comes with the extra trt-rtx"


def for_engines(manifest: Manifest, limits: EngineLimits = LIMITS) -> Manifest:
    """A manifest whose base graphs serve as portable ones of float32, for every target."""
    base = (graph for graph in manifest.graphs if graph.lowering == "onnxruntime")
    graphs = tuple(dataclasses.replace(graph, lowering="portable") for graph in base)
    targets = tuple(
        TargetSpec(name=name, lowering="portable", dtype=manifest.dtype, preflight=())
        for name in TARGETS
    )
    return dataclasses.replace(
        manifest, graphs=(*manifest.graphs, *graphs), engine_limits=limits, targets=targets
    )


def copy_for_engines(source: Path, out: Path) -> Bundle:
    """A bundle of the same files, made for every target."""
    return _copy(source, out, for_engines)


def copy_with_fixed_cache(source: Path, out: Path, slots: int) -> Bundle:
    """As :func:`copy_for_engines`; its manifest says of the decoder what that of a fused one does.

    The graph itself is what it was: for refusals, not to be built.
    """

    def fixed(graph: GraphSpec) -> GraphSpec:
        if (graph.lowering, graph.kv_contract) != ("portable", "concat"):
            return graph
        inputs = tuple(
            dataclasses.replace(
                tensor,
                shape=tuple(slots if d == "past_sequence_length" else d for d in tensor.shape),
            )
            for tensor in graph.inputs
        )
        return dataclasses.replace(graph, kv_contract="in_place", inputs=inputs)

    def change(manifest: Manifest) -> Manifest:
        made = for_engines(manifest)
        return dataclasses.replace(made, graphs=tuple(map(fixed, made.graphs)))

    return _copy(source, out, change)


def _copy(source: Path, out: Path, change: Callable[[Manifest], Manifest]) -> Bundle:
    bundle = open_bundle(source)
    with write_bundle(out) as draft:
        for file in bundle.manifest.files:
            draft.place(bundle.file(file.path), file.path, hold="copy")
        draft.commit(change(bundle.manifest))
    return open_bundle(out)


def contents(bundle: Bundle) -> set[str]:
    """Paths below a bundle's ``engines/``."""
    engines = bundle.path / "engines"
    return {str(p.relative_to(engines)) for p in engines.rglob("*")} if engines.exists() else set()


class Recorder:
    """A listener that remembers, and may do something at every step."""

    def __init__(self, at_step: Any = lambda: None) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.steps: list[int] = []
        self.at_step = at_step

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Any]:
        self.stages.append((title, total))
        self.steps.append(0)

        def advance(steps: int) -> None:
            self.steps[-1] += steps
            self.at_step()

        yield advance


def one_node_model(
    op_type: str,
    inputs: dict[str, tuple[int, list[Any]]],
    outputs: dict[str, tuple[int, list[Any]]],
    *,
    opset: int = 20,
    **attributes: Any,
) -> Any:
    """An ONNX model of a node named ``pick/<op_type>_3``."""
    from onnx import helper

    def values(specs: dict[str, tuple[int, list[Any]]]) -> list[Any]:
        return [helper.make_tensor_value_info(n, kind, dims) for n, (kind, dims) in specs.items()]

    node = helper.make_node(
        op_type, list(inputs), list(outputs), name=f"pick/{op_type}_3", **attributes
    )
    graph = helper.make_graph([node], "g", values(inputs), values(outputs))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
