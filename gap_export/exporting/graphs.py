"""From a component to ONNX files in the bundle: trace once, passes, then one file a lowering."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeVar

import onnx_ir as ir

from gap_export.checkpoint.weights import Int8Place, PlacedTensor, QuantizedPlace
from gap_export.engines.profiles import cache_capacity
from gap_export.errors import PassError
from gap_export.exporting.graph_cache import GraphCache
from gap_export.exporting.timing import timed
from gap_export.exporting.trace import OPSET, describe_interface, save_graph, trace_component
from gap_export.families import Component
from gap_export.graph.passes.bake_kept_positions import BakeKeptPositions
from gap_export.graph.passes.quantize_dynamically import QuantizeDynamically
from gap_export.graph.passes.quantize_linear import QuantizeLinear
from gap_export.graph.pipelines import (
    DECODER,
    LOWERINGS,
    ORT_PASSES,
    PIPELINES,
    DecoderLimits,
    lower,
    run_pipeline,
)
from gap_export.spec.manifest import (
    BASE,
    ORT,
    Activations,
    Attention,
    GraphSpec,
    Manifest,
    QuantizationSpec,
)
from gap_export.spec.positions import Int64Array

_SHORT_DTYPES: Mapping[str, str] = MappingProxyType(
    {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
)
_Place = TypeVar("_Place", QuantizedPlace, Int8Place)
KvContract = Literal["none", "concat", "in_place"]


@dataclass(frozen=True, kw_only=True)
class GraphWriter:
    """Writes the graphs of one bundle.

    Attributes:
        folder: The bundle's.
        quantization: How the weights that are quantized are.
        activations: What goes into layers of quantized weights in ONNX Runtime.
        baked_positions: int64 [P] or [A, P] that the decoder holds; None where it is fed them.
        attention: How the decoder weighs its tokens.
        limits: Of the decoder, for lowerings that ask for them.
        seconds: Receives how long each step took.
        cache: Asked first, where the pruning does not matter.
        warn: Receives why a form that is made where it can be was not made.
    """

    folder: Path
    quantization: QuantizationSpec | None
    activations: Activations
    baked_positions: Int64Array | None = None
    attention: Attention = "plain"
    limits: DecoderLimits | None
    seconds: dict[str, float] = field(repr=False)
    cache: GraphCache = field(repr=False)
    warn: Callable[[str], None] = field(repr=False)

    def write(
        self,
        component: Component,
        placed: Mapping[str, PlacedTensor],
        *,
        quantized: Mapping[str, QuantizedPlace | Int8Place],
        dtype: str,
        lowerings: Sequence[str],
    ) -> list[GraphSpec]:
        """Write one component's graphs.

        Args:
            component: On the meta device.
            placed: For each of its weights, where the bundle holds it.
            quantized: For those it holds as integers alone, where.
            dtype: Of its floats.
            lowerings: :data:`BASE`, or names of ``LOWERINGS``.

        Raises:
            ExportError: tracing or a pass failed.
        """
        table = self.baked_positions if component.name == DECODER else None
        # A graph says where its weights lie, so another place is another graph.
        made = (
            sorted(placed.items()),
            sorted(quantized.items()),
            self.limits,
            self.activations,
            self.attention,
            None if table is None else table.tolist(),
        )
        key = (component.name, dtype, *component.inputs, *component.outputs, str(made))
        specs: list[GraphSpec] = []
        base: ir.Model | None = None
        for lowering in lowerings:
            # Whose positions are baked is meant for other runtimes, and has their operators alone.
            if lowering == ORT and (component.name not in ORT_PASSES or table is not None):
                continue
            quantization = self.quantization if _of(QuantizedPlace, quantized) else None
            name = component.name
            if lowering != BASE:
                suffix = "" if quantization is None else f"_{quantization.dtype}"
                name += f"_{lowering}_{_SHORT_DTYPES[dtype]}{suffix}"
            path = self.folder / f"{name}.onnx"
            known = None if component.prunes else self.cache.get((*key, lowering))
            if known is not None:
                path.write_bytes(known[0])
                specs.append(known[1])
                continue
            base = base or self._trace(component, placed, quantized)
            try:
                model, kv_contract = self._lower(base, component, lowering)
            except PassError as err:
                if lowering != ORT:
                    raise
                self.warn(
                    f"ONNX Runtime runs the base form of {component.name}, which is slower: {err}"
                )
                continue
            save_graph(model, path)
            inputs, outputs = describe_interface(model)
            spec = GraphSpec(
                component=component.name,
                lowering=lowering,
                dtype=dtype,
                kv_contract=kv_contract,
                file=path.name,
                inputs=inputs,
                outputs=outputs,
                quantization=quantization,
                activations=self.activations
                if quantization and lowering in {BASE, ORT}
                else "float",
                linear_layers="int8" if _of(Int8Place, quantized) else "float",
            )
            specs.append(spec)
            if not component.prunes:
                self.cache.put((*key, lowering), path.read_bytes(), spec)
        return specs

    def _trace(
        self,
        component: Component,
        placed: Mapping[str, PlacedTensor],
        quantized: Mapping[str, QuantizedPlace | Int8Place],
    ) -> ir.Model:
        """The base graph."""
        with timed(self.seconds, f"trace {component.name}"):
            model = trace_component(component, placed=placed, opset=OPSET)
        with timed(self.seconds, f"passes {component.name}"):
            run_pipeline(model, PIPELINES[component.name])
            int4, int8 = _of(QuantizedPlace, quantized), _of(Int8Place, quantized)
            if int4:
                run_pipeline(model, [QuantizeLinear(int4)])
            if int8:
                run_pipeline(model, [QuantizeDynamically(int8)])
            if component.name == DECODER and self.baked_positions is not None:
                run_pipeline(model, [BakeKeptPositions(self.baked_positions)])
        return model

    def _lower(
        self, base: ir.Model, component: Component, lowering: str
    ) -> tuple[ir.Model, KvContract]:
        if lowering == BASE:
            return base, component.kv_contract
        with timed(self.seconds, f"passes {component.name}"):
            model = lower(base, component.name, lowering, limits=self.limits)
        has_cache = component.kv_contract != "none"
        return model, LOWERINGS[lowering].kv_contract if has_cache else "none"


def _of(kind: type[_Place], places: Mapping[str, object]) -> dict[str, _Place]:
    return {name: place for name, place in places.items() if isinstance(place, kind)}


def decoder_limits(manifest: Manifest) -> DecoderLimits | None:
    """What the fused decoder is made for; None where no engine is to be built."""
    limits = manifest.engine_limits
    if limits is None:
        return None
    return DecoderLimits(
        max_position_embeddings=manifest.decoder.max_position_embeddings,
        cache_capacity=cache_capacity(limits),
    )
