"""The forms a graph is given for TensorRT: pipelines of passes over a copy of the base graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import onnx_ir as ir

from gap_export.errors import PassError
from gap_export.graph.passes.check_operators import CheckOperators
from gap_export.graph.passes.decompose_integer_clip import DecomposeIntegerClip
from gap_export.graph.passes.drop_zero_bias import DropZeroBias
from gap_export.graph.passes.fuse_attention import FuseAttention
from gap_export.graph.passes.fuse_rms_norm import FuseRmsNorm
from gap_export.graph.passes.fuse_rotary import FuseRotary
from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.raise_opset import RaiseOpset
from gap_export.graph.passes.update_cache_in_place import PAST, UpdateCacheInPlace

# Read by TensorRT's parser from 10.3 on; neither If nor Loop nor NonZero, nor anything fused.
PORTABLE_OPERATORS = frozenset(
    """
    Abs Add And ArgMax Cast Clip Concat Constant Conv Cos CumSum DequantizeLinear Div Equal Erf
    Expand Gather GatherElements Gelu Gemm Greater GreaterOrEqual LayerNormalization Less
    LessOrEqual MatMul Max Min Mod Mul Neg Not Or Pow Range Reciprocal ReduceMax ReduceMean
    ReduceMin ReduceSum Reshape Scan Shape Sigmoid Sin Slice Softmax Sqrt Squeeze Sub Tanh TopK
    Transpose Unsqueeze Where
    """.split()
)
FUSED_OPERATORS = PORTABLE_OPERATORS | {
    "Attention",
    "RMSNormalization",
    "RotaryEmbedding",
    "TensorScatter",
}
# Blocked DequantizeLinear is of opset 21; a graph without INT4 weights stays at its own, 20.
_PORTABLE_OPSET, _FUSED_OPSET = 21, 24


@dataclass(frozen=True, kw_only=True)
class DecoderLimits:
    """What the fused decoder must know beforehand.

    Attributes:
        max_position_embeddings: Position ids are below it; the model's own figure.
        cache_capacity: Slots of the KV cache: the longest prompt and all new tokens.
    """

    max_position_embeddings: int
    cache_capacity: int


Pipeline = Callable[[DecoderLimits | None], tuple[GraphPass, ...]]


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """A form of the graphs.

    Attributes:
        name: As in file names and the manifest.
        opset: Highest it declares.
        kv_contract: Of the decoder.
        dtypes: Of the graph's floats.
        pipelines: By component, the passes for given limits; None where a caller has none.
    """

    name: str
    opset: int
    kv_contract: Literal["concat", "in_place"]
    dtypes: tuple[str, ...]
    pipelines: Mapping[str, Pipeline]


def _portable(_: DecoderLimits | None) -> tuple[GraphPass, ...]:
    return (
        DropZeroBias(),
        DecomposeIntegerClip(),
        CheckOperators(
            lowering="portable", operators=PORTABLE_OPERATORS, max_opset=_PORTABLE_OPSET
        ),
    )


def _fused(_: DecoderLimits | None) -> tuple[GraphPass, ...]:
    return (
        RaiseOpset(),
        DropZeroBias(),
        DecomposeIntegerClip(),
        FuseAttention(),
        CheckOperators(lowering="fused", operators=FUSED_OPERATORS, max_opset=_FUSED_OPSET),
    )


def _fused_decoder(limits: DecoderLimits | None) -> tuple[GraphPass, ...]:
    if limits is None:
        raise PassError(
            "the fused decoder must know its limits beforehand",
            seen="none",
            allowed="max_position_embeddings and cache_capacity",
        )
    return (
        RaiseOpset(),
        FuseRmsNorm(),
        FuseRotary(max_position_embeddings=limits.max_position_embeddings),
        UpdateCacheInPlace(capacity=limits.cache_capacity),
        FuseAttention(),
        CheckOperators(lowering="fused", operators=FUSED_OPERATORS, max_opset=_FUSED_OPSET),
    )


LOWERINGS: Mapping[str, Lowering] = MappingProxyType(
    {
        lowering.name: lowering
        for lowering in (
            Lowering(
                name="portable",
                opset=_PORTABLE_OPSET,
                kv_contract="concat",
                dtypes=("float16", "bfloat16", "float32"),
                pipelines=MappingProxyType(
                    {
                        "vision_encoder": _portable,
                        "token_pruner": _portable,
                        "text_encoder": _portable,
                        "embed_tokens": _portable,
                        "decoder_model_merged": _portable,
                    }
                ),
            ),
            Lowering(
                name="fused",
                opset=_FUSED_OPSET,
                kv_contract="in_place",
                # TensorRT has no Attention kernel for float32.
                dtypes=("float16", "bfloat16"),
                pipelines=MappingProxyType(
                    {
                        "vision_encoder": _fused,
                        "token_pruner": _fused,
                        "text_encoder": _fused,
                        "embed_tokens": _fused,
                        "decoder_model_merged": _fused_decoder,
                    }
                ),
            ),
        )
    }
)


def lower(
    model: ir.Model, component: str, lowering: str, *, limits: DecoderLimits | None = None
) -> ir.Model:
    """A component's graph in another form.

    Args:
        model: As it is behind the component's base pipeline; it is left as it is.
        component: Its name.
        lowering: Name of the form.
        limits: Of the decoder, where the form asks for them.

    Returns:
        A copy that refers to the same weights; none of them is read.

    Raises:
        PassError: no such form or component, a dtype the form has no kernels for, limits that are
            missing, or a graph that is not what a pass handles.
    """
    form = LOWERINGS.get(lowering)
    if form is None:
        raise PassError("no such lowering", seen=lowering, allowed=", ".join(LOWERINGS))
    if component not in form.pipelines:
        raise PassError("no such component", seen=component, allowed=", ".join(form.pipelines))
    dtype = _float_of(model.graph)
    if dtype not in form.dtypes:
        raise PassError(
            f"the {lowering} form of {component} is not made in this dtype",
            seen=dtype,
            allowed=", ".join(form.dtypes),
            fix="export in one of them (--dtype), or use another lowering",
        )
    passes = form.pipelines[component](limits)
    lowered = model.clone()
    for graph_pass in passes:
        graph_pass.run(lowered)
    if form.kv_contract == "in_place":
        _check_every_layer(lowered.graph)
    return lowered


def _float_of(graph: ir.Graph) -> str:
    """The dtype of the float outputs; the narrowest, since scores are float32 in any graph."""
    dtypes = [value.dtype for value in graph.outputs if value.dtype is not None]
    floats = [dtype for dtype in dtypes if dtype.is_floating_point()]
    return min(floats, key=lambda dtype: dtype.bitwidth).numpy().name if floats else "none"


def _check_every_layer(graph: ir.Graph) -> None:
    """Hold a decoder to one attention, two rotations, caches and norms a layer, and a last norm."""
    caches = sum(PAST.fullmatch(value.name or "") is not None for value in graph.inputs)
    layers = caches // 2
    if not layers:
        return
    wanted = {
        "Attention": layers,
        "RotaryEmbedding": 2 * layers,
        "TensorScatter": 2 * layers,
        "RMSNormalization": 2 * layers + 1,
    }
    kinds = [node.op_type for node in graph]
    seen = {kind: kinds.count(kind) for kind in wanted}
    if seen != wanted:
        raise PassError(
            f"a decoder of {layers} layers was not fused in full", seen=seen, allowed=str(wanted)
        )
