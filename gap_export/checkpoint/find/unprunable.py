"""Models whose tokens cannot be dropped with position ids kept, by what their config.json says.

Pruning with original position ids is exact for one reason: a decoder that is fed the kept tokens
computes what the whole one does when no query may see the others. That holds where tokens meet in
attention alone, each seeing all before it. It does not hold where a layer counts slots.
"""

from __future__ import annotations

import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gap_export.errors import CheckpointError

_STATE = (
    "linear attention or a state space: every slot changes a running state, so that what is left "
    "of a token depends on how many follow it"
)
_CONVOLUTION = (
    "convolutions over slots: where a token is dropped, others become neighbors that never were"
)
_WINDOW = (
    "sliding windows that are counted in slots: where tokens are dropped, a window reaches further "
    "back than it did"
)
# How a model_type begins, what people call the model, and what stands in the way.
_MODELS: tuple[tuple[str, str, str], ...] = (
    ("qwen3_5", "Qwen3.5", _STATE),
    ("qwen3_next", "Qwen3-Next", _STATE),
    ("lfm2", "LFM2", _CONVOLUTION),
    ("gemma2", "Gemma 2", _WINDOW),
    ("gemma3", "Gemma 3", _WINDOW),
    ("gemma4", "Gemma 4", _WINDOW),
    ("mamba", "Mamba", _STATE),
    ("jamba", "Jamba", _STATE),
    ("bamba", "Bamba", _STATE),
    ("nemotron_h", "Nemotron-H", _STATE),
    ("falcon_h1", "Falcon-H1", _STATE),
    ("granitemoehybrid", "Granite 4", _STATE),
    ("kimi_linear", "Kimi Linear", _STATE),
    ("recurrent_gemma", "RecurrentGemma", _STATE),
    ("rwkv", "RWKV", _STATE),
)
# What transformers' configs call layers, of whichever model.
_LAYERS: Mapping[str, str] = {
    "linear_attention": _STATE,
    "mamba": _STATE,
    "conv": _CONVOLUTION,
    "sliding_attention": _WINDOW,
    "chunked_attention": _WINDOW,
}


def refuse_unprunable(place: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model for which "pruned equals unpruned and masked" cannot hold.

    Args:
        place: Where it lies, for the message.
        config: Its config.json, parsed.

    Raises:
        CheckpointError: the model, or a layer of its decoder, is known to count slots.
    """
    for title, seen, reason in _found(config):
        raise CheckpointError(
            f"{place} is {title}, whose tokens cannot be dropped with position ids kept",
            seen=f"{seen}; it has {reason}",
            allowed="decoders of full attention in every layer",
            fix="take a model of a family that has one; gap-export models lists those that are "
            "exported",
        )


def _found(config: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """What a model is called, what shows it, and the reason."""
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    for section in sections:
        kind = section.get("model_type")
        for start, title, reason in _MODELS:
            if isinstance(kind, str) and kind.startswith(start):
                yield title, f"model_type {reprlib.repr(kind)}", reason
    for section in sections:
        layers = section.get("layer_types")
        for name, reason in _LAYERS.items():
            if isinstance(layers, list) and name in layers:
                kind = reprlib.repr(config.get("model_type"))
                yield f"a model of type {kind}", f"layer_types with {name}", reason
