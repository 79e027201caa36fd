"""The graph that an export would make now, with the weights that a bundle has.

Beside the bundle's own graph it shows which node was changed: values have the same names in both.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx_ir as ir

from gap_export.checkpoint.weights import (
    SAFETENSORS_NAMES,
    Int8Place,
    PlacedTensor,
    QuantizedPlace,
)
from gap_export.checkpoint.weights.weight import READABLE_DTYPES
from gap_export.errors import ExportError
from gap_export.exporting.quantization import linear_keys
from gap_export.exporting.trace import trace_component
from gap_export.families import Component, build_reference
from gap_export.graph.onnx_file import OnnxFile
from gap_export.graph.passes.quantize_dynamically import QuantizeDynamically
from gap_export.graph.passes.quantize_linear import QuantizeLinear
from gap_export.graph.pipelines import PIPELINES, run_pipeline
from gap_export.parity.inside.reference_taps import ReferenceTaps
from gap_export.spec.manifest import QuantizationSpec

# Which parts of a quantized weight are initializers of their own.
_PARTS = ("", ".int4", ".int8", ".scales")


def export_again(candidate: OnnxFile, component: str, truth: ReferenceTaps) -> OnnxFile | None:
    """Trace a component anew, by the same steps as an export.

    Args:
        candidate: The bundle's base graph of that component.
        component: Its name.
        truth: What it was made from.

    Returns:
        A graph that reads the candidate's weights; None where the model cannot be traced here.
    """
    if component not in truth.traced:
        truth.traced[component] = _trace(component, truth, candidate)
    raw = truth.traced[component]
    if raw is None:
        return None
    names = truth.reference.component(component).weight_refs
    weights = {f"{key}{part}" for key in names for part in _PARTS}
    given = {name: held for name, held in candidate.initializers.items() if name in weights}
    return OnnxFile(raw, candidate.folder).with_initializers(given)


def _trace(name: str, truth: ReferenceTaps, candidate: OnnxFile) -> bytes | None:
    component = build_reference(
        truth.recipe, truth.checkpoint, truth.pruning, device="meta", dtype=truth.reference.dtype
    ).component(name)
    dtype = SAFETENSORS_NAMES[truth.reference.dtype]
    placed = {key: _nowhere(dtype, weight.shape) for key, weight in component.weight_refs.items()}
    quantization = truth.quantization if name == "decoder_model_merged" else None
    int8 = {
        key: Int8Place(
            values=_nowhere("I8", weight.shape[::-1]), scales=_nowhere("F32", weight.shape[:1])
        )
        for key, weight in component.weight_refs.items()
        if f"{key}.int8" in candidate.initializers
    }
    try:
        model = trace_component(component, placed=placed)
        run_pipeline(model, PIPELINES[name])
        if quantization is not None:
            run_pipeline(model, [QuantizeLinear(_quantized(component, quantization, dtype))])
        if int8:
            run_pipeline(model, [QuantizeDynamically(int8)])
    except ExportError:
        # It helps to name an operator; whether the bundle is right has been found without it.
        return None
    raw: bytes = ir.serde.serialize_model(model).SerializeToString()
    return raw


def _quantized(
    component: Component, spec: QuantizationSpec, dtype: str
) -> Mapping[str, QuantizedPlace]:
    places = {}
    for key in linear_keys(component, lm_head=spec.lm_head):
        rows, width = component.weight_refs[key].shape
        places[key] = QuantizedPlace(
            packed=_nowhere("U8", (rows * width // 2,)),
            scales={dtype: _nowhere(dtype, (width // spec.block_size, rows))},
            shape=(width, rows),
            block_size=spec.block_size,
        )
    return places


def _nowhere(dtype: str, shape: tuple[int, ...]) -> PlacedTensor:
    """A place to be replaced by where the candidate has it."""
    length = math.prod(shape) * READABLE_DTYPES[dtype].itemsize
    return PlacedTensor(location="weights", dtype=dtype, shape=shape, offset=0, length=length)
