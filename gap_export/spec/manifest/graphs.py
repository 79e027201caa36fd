"""The parts of ``gap.json`` about graphs, and about the engines that are built from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from gap_export.spec.manifest.facts import Strict
from gap_export.spec.manifest.plain import RARE

Activations = Literal["float", "int8"]


@dataclass(frozen=True, kw_only=True)
class TensorPlace(Strict):
    """A tensor that the runtime itself reads.

    Attributes:
        file: Path within the bundle.
        offset: Where its first byte is.
        dtype: float32, float16 or bfloat16, little-endian.
        shape: Dimensions, row-major.
    """

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TensorSpec(Strict):
    """A graph's input or output. A dimension is a number or a name."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class QuantizationSpec(Strict):
    """Weights held in fewer bits; what is computed with stays in the graph's dtype.

    Attributes:
        dtype: ``int4``, symmetric.
        block_size: Weights of one output channel that share a scale, along the input.
        method: ``rtn``: rounded to nearest; ``awq``: input channels scaled by what calibration saw
            (arXiv 2306.00978), then rounded.
        lm_head: Whether the LM head is quantized, too.
    """

    dtype: Literal["int4"]
    block_size: int
    method: Literal["rtn", "awq"]
    lm_head: bool


@dataclass(frozen=True, kw_only=True)
class GraphSpec(Strict):
    """One ONNX file of the bundle.

    Attributes:
        component: vision_encoder, text_encoder, embed_tokens or decoder_model_merged.
        lowering: ``onnxruntime`` for the base graphs; ``ort`` for those of ONNX Runtime's own
            operators; ``portable`` or ``fused`` for TensorRT's.
        dtype: Dtype of the float inputs and outputs; ``pixel_values`` is always float32.
        kv_contract: ``concat``: present = past and new, joined; ``in_place``: past and present are
            one buffer [B, heads, capacity, dim] of which the first slots are filled, and a step
            writes the new ones behind them; ``none``: no cache. With ``ort`` the capacity is what
            is fed, each row has its own number of filled slots, and ``attention_mask`` must be
            ones, as many as are filled and new, with zeros behind.
        file: Path within the bundle.
        quantization: How the weights are quantized; None where they have the graph's dtype.
        activations: What goes into a layer of quantized weights in ONNX Runtime on a CPU: ``float``
            as it is; ``int8`` rounded to 8 bits in blocks that share a scale.
        linear_layers: ``int8``: the tower's layers hold 8-bit weights, one scale an output channel,
            and round what goes in to unsigned 8 bits, between the smallest and the largest value of
            each run; ``float``: they compute in the graph's dtype.
    """

    component: str
    lowering: str
    dtype: str
    kv_contract: Literal["none", "concat", "in_place"]
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    quantization: QuantizationSpec | None = None
    activations: Activations = field(default="float", metadata=RARE)
    linear_layers: Literal["float", "int8"] = field(default="float", metadata=RARE)


@dataclass(frozen=True, kw_only=True)
class EngineLimits(Strict):
    """The largest sizes that engines are built for; the smallest are 1, and 0 for the past.

    Attributes:
        max_prompt: P, prompt tokens after pruning.
        max_new_tokens: Tokens of an answer. The cache has max_prompt + max_new_tokens slots.
        max_batch: B, expressions asked at a time.
        max_images: I, images at a time, or the tiles of one.
    """

    max_prompt: int
    max_new_tokens: int
    max_batch: int
    max_images: int


@dataclass(frozen=True, kw_only=True)
class PreflightVerdict(Strict):
    """What a static look at a graph says of building it on a device that is not at hand.

    Attributes:
        component: Which graph.
        verdict: ``fine``; ``unverified``: holds operators that are not documented; ``blocked``.
        operators: Those that are not fine.
        reasons: One line each, for people.
    """

    component: str
    verdict: Literal["fine", "unverified", "blocked"]
    operators: tuple[str, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TargetSpec(Strict):
    """What a bundle has for one TensorRT target.

    Attributes:
        name: Name of the target, e.g. ``orin``.
        lowering: Lowering of the graphs that its engines are built from.
        dtype: Dtype of those graphs.
        preflight: A verdict for each component, against the oldest TensorRT of the target; empty
            where engines are built by the export itself.
    """

    name: str
    lowering: str
    dtype: str
    preflight: tuple[PreflightVerdict, ...]
