"""What a decoder must take and give so that a session can run it, and what that says of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from gap_export.errors import PassError
from gap_export.graph.passes.insert_gap_remap import POSITION_IDS, position_axes
from gap_export.graph.passes.matching import static_dim

_EMBEDS, _MASK, _LOGITS = "inputs_embeds", "attention_mask", "logits"
_PAST = re.compile(r"past_key_values\.(\d+)\.(key|value)")
_LAYOUT = (
    "past_key_values.{i}.key and .value of shape [batch, heads, past, head width], heads and width "
    "given as numbers, and present.{i}.key and .value"
)
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})


@dataclass(frozen=True, kw_only=True)
class DecoderFacts:
    """Sizes that a decoder's interface shows; None where it leaves one open.

    Attributes:
        position_ids: The input.
        position_axes: Ids of a token: 1, or 3 with M-RoPE.
        num_layers: Layers of the KV cache.
        num_key_value_heads: Heads of the KV cache.
        head_dim: Width of a head of the KV cache.
        hidden_size: Width of ``inputs_embeds``.
        vocab_size: Width of ``logits``.
    """

    position_ids: ir.Value
    position_axes: Literal[1, 3]
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    hidden_size: int | None
    vocab_size: int | None


def read_decoder_interface(graph: ir.Graph) -> DecoderFacts:
    """Read and check a decoder's inputs and outputs.

    Raises:
        PassError: an input that is not fed, one that is missing, or a KV cache of another
            layout.
    """
    inputs = {str(value.name): value for value in graph.inputs}
    outputs = {str(value.name): value for value in graph.outputs}
    # First, since it is what most decoders that cannot be patched lack.
    given = inputs.get(POSITION_IDS)
    axes = position_axes(given) if given is not None else None
    position_ids = _find(inputs, POSITION_IDS, ir.DataType.INT64, rank=3 if axes == 3 else 2)
    _find(inputs, _MASK, ir.DataType.INT64, rank=2)
    embeds = _find(inputs, _EMBEDS, *_FLOATS, rank=3)
    caches = {name: _PAST.fullmatch(name) for name in inputs}
    strange = [
        name for name, is_cache in caches.items()
        if not is_cache and name not in {POSITION_IDS, _MASK, _EMBEDS}
    ]  # fmt: skip
    if strange:
        is_cache = any(name.startswith("past") for name in strange)
        raise PassError(
            "the decoder's KV cache has a layout that is not known"
            if is_cache
            else "the decoder has inputs that are not fed",
            seen=_shorten(strange),
            allowed=_LAYOUT if is_cache else f"{_EMBEDS}, {_MASK}, {POSITION_IDS}, the KV cache",
        )
    layers = {int(match[1]) for match in caches.values() if match}
    shape = _cache_shape(inputs, layers)
    wanted = {f"present.{layer}.{part}" for layer in layers for part in ("key", "value")} | {
        _LOGITS
    }
    missing, others = wanted - set(outputs), set(outputs) - wanted
    if missing or others:
        raise PassError(
            "the decoder's outputs are not logits and the grown KV cache",
            seen=_shorten(sorted(missing or others)) + (" missing" if missing else " besides"),
            allowed=f"{_LOGITS}, and for {_LAYOUT}",
        )
    return DecoderFacts(
        position_ids=position_ids,
        position_axes=axes or 1,
        num_layers=len(layers),
        num_key_value_heads=shape[0],
        head_dim=shape[1],
        hidden_size=static_dim(embeds, 2),
        vocab_size=static_dim(outputs[_LOGITS], -1),
    )


def _find(inputs: Mapping[str, ir.Value], name: str, *dtypes: ir.DataType, rank: int) -> ir.Value:
    allowed = f"an input {name} of {rank} axes, {' or '.join(sorted(d.name for d in dtypes))}"
    if name == POSITION_IDS:
        allowed += ", or of shape [3, batch, sequence] with M-RoPE"
    if name not in inputs:
        raise PassError(
            f"the decoder has no input called {name}",
            seen="inputs " + _shorten(list(inputs)),
            allowed=allowed,
            fix="export the decoder with explicit position ids; a graph that builds them from the "
            "attention mask or the cache's length cannot be mended from outside"
            if name == POSITION_IDS
            else None,
        )
    value = inputs[name]
    if value.dtype not in dtypes or value.shape is None or value.shape.rank() != rank:
        raise PassError(
            f"the decoder's input {name} is not what is fed",
            seen=f"{value.dtype} {value.shape}",
            allowed=allowed,
        )
    return value


def _cache_shape(inputs: Mapping[str, ir.Value], layers: set[int]) -> tuple[int, int]:
    """Heads and head width, the same for all keys and values."""
    names = [f"past_key_values.{layer}.{part}" for layer in layers for part in ("key", "value")]
    if not layers or layers != set(range(len(layers))) or any(n not in inputs for n in names):
        raise PassError(
            "the decoder's KV cache has a layout that is not known",
            seen=_shorten([n for n in inputs if n.startswith("past")]) or "no past_key_values",
            allowed=_LAYOUT,
        )
    shapes = {
        (static_dim(inputs[name], 1), static_dim(inputs[name], 2), static_dim(inputs[name], 3))
        for name in names
        if inputs[name].dtype in _FLOATS
    }
    heads, past, width = next(iter(shapes), (None, None, None))
    if len(shapes) != 1 or heads is None or width is None or past is not None:
        seen = inputs[names[0]]
        raise PassError(
            "the decoder's KV cache has a layout that is not known",
            seen=f"{seen.name}: {seen.dtype} {seen.shape}"
            + (f", also {sorted(shapes, key=str)}" if len(shapes) > 1 else ""),
            allowed=_LAYOUT,
        )
    return heads, width


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
