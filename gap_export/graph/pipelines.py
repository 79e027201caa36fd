"""The passes that make each graph's base form, and its forms for other runtimes, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import onnx_ir as ir

from gap_export.errors import PassError
from gap_export.graph.passes.check_operators import check_operators
from gap_export.graph.passes.decompose_integer_clip import DecomposeIntegerClip
from gap_export.graph.passes.drop_zero_bias import DropZeroBias
from gap_export.graph.passes.fold_constants import FoldConstants
from gap_export.graph.passes.fuse_attention import FuseAttention
from gap_export.graph.passes.fuse_group_query_attention import ATTENTION, FuseGroupQueryAttention
from gap_export.graph.passes.fuse_linear import FuseLinear
from gap_export.graph.passes.fuse_rms_norm import FuseRmsNorm
from gap_export.graph.passes.fuse_rotary import FuseRotary
from gap_export.graph.passes.fuse_simplified_norm import (
    NORM,
    SKIP_NORM,
    FuseSimplifiedNorm,
    FuseSkipNorm,
)
from gap_export.graph.passes.give_more_logits import GiveMoreLogits
from gap_export.graph.passes.graph_pass import GraphPass
from gap_export.graph.passes.insert_gap_remap import InsertGapRemap
from gap_export.graph.passes.matching import CONTRIB, is_operator, qualified_name
from gap_export.graph.passes.raise_opset import UNCHANGED_OPERATORS, RaiseOpset
from gap_export.graph.passes.rotate_by_rows import ROTARY, RotateByRows
from gap_export.graph.passes.strip_trace_metadata import StripTraceMetadata
from gap_export.graph.passes.take_num_kept_tokens import TakeNumKeptTokens
from gap_export.graph.passes.update_cache_in_place import PAST, UpdateCacheInPlace
from gap_export.spec.manifest import ORT, ORT_LOGITS

DECODER = "decoder_model_merged"
PIPELINES: Mapping[str, tuple[GraphPass, ...]] = MappingProxyType(
    {
        name: (FoldConstants(), *passes, StripTraceMetadata())
        for name, passes in (
            ("vision_encoder", (FuseLinear(),)),
            ("token_pruner", (FuseLinear(), TakeNumKeptTokens())),
            ("text_encoder", (FuseLinear(),)),
            ("embed_tokens", ()),
            (DECODER, (FuseLinear(), InsertGapRemap())),
        )
    }
)

# Read by TensorRT's parser from 10.3 on; neither If nor Loop nor NonZero, nor anything fused.
PORTABLE_OPERATORS = UNCHANGED_OPERATORS
FUSED_OPERATORS = PORTABLE_OPERATORS | {
    "Attention",
    "RMSNormalization",
    "RotaryEmbedding",
    "TensorScatter",
}
# ONNX Runtime's own, beside what it takes of the standard ones.
ORT_OPERATORS = PORTABLE_OPERATORS | {
    NORM,
    "ReduceProd",
    *(f"{CONTRIB}::{name}" for name in (ATTENTION, ROTARY, SKIP_NORM)),
}
# The passes of the form for ONNX Runtime; of other components the base form is what it gets.
ORT_PASSES: Mapping[str, tuple[GraphPass, ...]] = MappingProxyType(
    {
        DECODER: (
            FuseSimplifiedNorm(),
            FuseSkipNorm(),
            RotateByRows(),
            FuseGroupQueryAttention(),
            GiveMoreLogits(count=ORT_LOGITS),
        )
    }
)


@dataclass(frozen=True, kw_only=True)
class DecoderLimits:
    """What the fused decoder must know beforehand.

    Attributes:
        max_position_embeddings: Position ids are below it; the model's own figure.
        cache_capacity: Slots of the KV cache: the longest prompt and all new tokens.
    """

    max_position_embeddings: int
    cache_capacity: int


@dataclass(frozen=True, kw_only=True)
class Lowering:
    """A form of the graphs.

    Attributes:
        opset: The highest it declares.
        operators: All that it may use.
        kv_contract: Whether the decoder's cache grows or is written in place.
        dtypes: Those its floats may have.
    """

    opset: int
    operators: frozenset[str]
    kv_contract: Literal["concat", "in_place"]
    dtypes: tuple[str, ...]


LOWERINGS: Mapping[str, Lowering] = MappingProxyType(
    {
        "portable": Lowering(
            # Blocked DequantizeLinear is of opset 21; without INT4 weights a graph stays at 20.
            opset=21,
            operators=PORTABLE_OPERATORS,
            kv_contract="concat",
            dtypes=("float16", "bfloat16", "float32"),
        ),
        "fused": Lowering(
            opset=24,
            operators=FUSED_OPERATORS,
            kv_contract="in_place",
            # TensorRT has no Attention kernel for float32.
            dtypes=("float16", "bfloat16"),
        ),
        ORT: Lowering(
            opset=21,
            operators=ORT_OPERATORS,
            kv_contract="in_place",
            dtypes=("float32", "float16"),
        ),
    }
)


def run_pipeline(model: ir.Model, passes: Sequence[GraphPass]) -> None:
    """Run passes in order, in place.

    Raises:
        PassError: one declined or broke its contract.
    """
    for graph_pass in passes:
        graph_pass.run(model)


def lower(
    model: ir.Model, component: str, lowering: str, *, limits: DecoderLimits | None = None
) -> ir.Model:
    """A component's graph in another form.

    Args:
        model: The result of the component's base pipeline; it is not changed.
        component: Its name.
        lowering: Name of the form.
        limits: The decoder's, where the form asks for them.

    Returns:
        A copy that refers to the same weights; none of them is read.

    Raises:
        PassError: no such form or component, a dtype the form has no kernels for, limits that are
            missing, or a graph that is not what a pass handles.
    """
    form = LOWERINGS.get(lowering)
    if form is None:
        raise PassError("no such lowering", seen=lowering, allowed=", ".join(LOWERINGS))
    if component not in PIPELINES:
        raise PassError("no such component", seen=component, allowed=", ".join(PIPELINES))
    # The narrowest of the float outputs, since scores are float32 in any graph.
    floats = [v.dtype for v in model.graph.outputs if v.dtype and v.dtype.is_floating_point()]
    dtype = min(floats, key=lambda d: d.bitwidth).numpy().name if floats else "none"
    if dtype not in form.dtypes:
        raise PassError(
            f"the {lowering} form of {component} is not made in this dtype",
            seen=dtype,
            allowed=", ".join(form.dtypes),
            fix="export in one of them (--dtype), or use another lowering",
        )
    lowered = model.clone()
    run_pipeline(lowered, _passes_of(component, lowering, limits))
    check_operators(lowered, lowering=lowering, operators=form.operators, max_opset=form.opset)
    if form.kv_contract == "in_place":
        _check_every_layer(lowered.graph, _IN_A_LAYER[lowering])
    return lowered


def _passes_of(component: str, lowering: str, limits: DecoderLimits | None) -> list[GraphPass]:
    if lowering == ORT:
        return list(ORT_PASSES.get(component, ()))
    passes: list[GraphPass] = [DropZeroBias(), DecomposeIntegerClip()]
    if lowering == "fused":
        passes = [RaiseOpset(), *passes]
        if component == DECODER:
            if limits is None:
                raise PassError(
                    "the fused decoder must know its limits beforehand",
                    seen="none",
                    allowed="max_position_embeddings and cache_capacity",
                )
            passes += [
                FuseRmsNorm(),
                FuseRotary(max_position_embeddings=limits.max_position_embeddings),
                UpdateCacheInPlace(capacity=limits.cache_capacity),
            ]
        passes.append(FuseAttention())
    return passes


# How many nodes of each kind a layer of the decoder has.
_IN_A_LAYER: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "fused": {"Attention": 1, "RotaryEmbedding": 2, "TensorScatter": 2},
        ORT: {f"{CONTRIB}::{ATTENTION}": 1, f"{CONTRIB}::{ROTARY}": 2},
    }
)


def _check_every_layer(graph: ir.Graph, in_a_layer: Mapping[str, int]) -> None:
    """Hold a decoder to one attention, two rotations and caches a layer, and to all of its norms.

    How many norms a layer has, and of which kind, the weights say: one of a single axis belongs to
    a norm unless it is added. So it is for Llama (2 a layer), Qwen3 (4) and GPT-NeoX (LayerNorm).
    """
    layers = sum(PAST.fullmatch(value.name or "") is not None for value in graph.inputs) // 2
    if not layers:
        return
    wanted = {kind: number * layers for kind, number in in_a_layer.items()}
    kinds = [qualified_name(node) for node in graph]
    seen = {kind: kinds.count(kind) for kind in wanted}
    if seen != wanted:
        raise PassError(
            f"a decoder of {layers} layers was not fused in full", seen=seen, allowed=str(wanted)
        )
    for weight in graph.initializers.values():
        if isinstance(weight.const_value, ir.ExternalTensor) and len(weight.const_value.shape) == 1:
            for node, _ in weight.uses():
                if is_operator(node, "Mul"):
                    raise PassError(
                        "a norm of the decoder was not fused",
                        seen=f"{weight.name}, read by Mul {node.name}",
                        allowed="RMSNormalization, LayerNormalization",
                    )
