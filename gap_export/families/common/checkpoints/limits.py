"""Values of a config.json that no model can have, refused before anything is built from them."""

from __future__ import annotations

import reprlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.activations import ACT2FN

from gap_export.errors import CheckpointError

# Far above any model, and low enough that no product of two makes a shape torch cannot describe.
_MAX_SIZE = 1 << 20
_MAX_PIXELS = 1 << 14
_MAX_MERGE = 1 << 6
# Hundreds of values, of lists in a dict in a dict, are much for a config.json.
_MAX_VALUES = 10_000
_MAX_DEPTH = 20
# Ids are turned into float32 for RoPE, which holds integers exactly up to here.
_MAX_POSITIONS = 1 << 24

_SIZES: Mapping[str, int] = {
    "hidden_size": _MAX_SIZE,
    "intermediate_size": _MAX_SIZE,
    "num_attention_heads": _MAX_SIZE,
    "num_key_value_heads": _MAX_SIZE,
    "head_dim": _MAX_SIZE,
    "vocab_size": _MAX_SIZE,
    "projection_dim": _MAX_SIZE,
    # Of Qwen's vision towers.
    "embed_dim": _MAX_SIZE,
    "out_hidden_size": _MAX_SIZE,
    "num_heads": _MAX_SIZE,
    "num_position_embeddings": _MAX_SIZE,
    "spatial_merge_size": _MAX_MERGE,
    "temporal_patch_size": _MAX_MERGE,
    "window_size": _MAX_PIXELS,
    "image_size": _MAX_PIXELS,
    "patch_size": _MAX_PIXELS,
    "max_position_embeddings": _MAX_POSITIONS,
}
# What configs call the number of layers.
_LAYERS = ("num_hidden_layers", "depth")
# Where these are null, they follow from the other sizes.
_NULLABLE = frozenset({"num_key_value_heads", "head_dim", "rope_theta"})
_POSITIVE = ("layer_norm_eps", "rms_norm_eps", "rope_theta")
_ACTIVATIONS = ("hidden_act", "projector_hidden_act")
_SECTIONS = ("text_config", "vision_config", "rope_parameters", "rope_scaling")
# These hold weights of their own, which no CLIP or Llama checkpoint has.
_WITH_WEIGHTS = frozenset({"prelu", "xielu"})


def check_extent(plain: Mapping[str, Any], file: Path) -> None:
    """Refuse what takes a parser of configs long, or nests too deep for it.

    Args:
        plain: The parsed file.
        file: Named in messages.

    Raises:
        CheckpointError: too many values, or values nested too deep.
    """
    level: list[Any] = [plain]
    depth = total = 0
    while level:
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [v for values in inner for v in values if isinstance(v, (dict, list))]
        total += sum(len(values) for values in inner)
        depth += 1
        if total > _MAX_VALUES or depth > _MAX_DEPTH:
            raise CheckpointError(
                f"{file}: no config.json of a model",
                seen=f"more than {_MAX_VALUES} values"
                if total > _MAX_VALUES
                else f"values nested deeper than {_MAX_DEPTH}",
                fix="use the config.json that these weights were saved with",
            )


def require(ok: bool, key: str, seen: object, allowed: str, *, where: object) -> None:
    """Refuse one value of a config.

    Raises:
        CheckpointError: not ``ok``.
    """
    if not ok:
        raise CheckpointError(
            f"{where}: {key} cannot be used",
            seen=reprlib.repr(seen),
            allowed=allowed,
            fix="use the config.json that these weights were saved with",
        )


def check_values(
    plain: Mapping[str, Any], file: Path, *, max_layers: int, prefix: str = ""
) -> None:
    """Check a config.json and its nested configs; keys that are left out are not looked at.

    Args:
        plain: The parsed file, or a config in it.
        file: Named in messages.
        max_layers: No more than the checkpoint has tensors.
        prefix: Put before the names of keys, for a config within another.

    Raises:
        CheckpointError: a value is of the wrong type or out of range.
    """
    most = min(max_layers, _MAX_SIZE)
    sizes = {**_SIZES, **dict.fromkeys(_LAYERS, most)}
    for key, value in plain.items():
        name = prefix + key
        if value is None and key in _NULLABLE:
            continue
        if key in sizes:
            limit = sizes[key]
            allowed = f"a whole number, 1..{limit}"
            if key in _LAYERS:
                allowed += " (the checkpoint has no more tensors)"
            require(type(value) is int and 1 <= value <= limit, name, value, allowed, where=file)
        elif key in _POSITIVE:
            positive = type(value) in (int, float) and 0 < value <= sys.float_info.max
            require(positive, name, value, "a number above 0", where=file)
        elif key in _ACTIVATIONS:
            known = sorted(set(ACT2FN) - _WITH_WEIGHTS)
            require(
                isinstance(value, str) and value in known,
                name,
                value,
                ", ".join(known),
                where=file,
            )
        elif key in _SECTIONS and isinstance(value, dict):
            check_values(value, file, max_layers=max_layers, prefix=f"{name}.")
    # Sizes that are fine one by one and do not fit each other.
    width, heads, head_dim = map(plain.get, ("hidden_size", "num_attention_heads", "head_dim"))
    if head_dim is not None:
        allowed = "an even number: RoPE turns pairs"
        require(head_dim % 2 == 0, f"{prefix}head_dim", head_dim, allowed, where=file)
    elif width is not None and heads is not None:
        allowed = f"a divisor of hidden_size, {width}"
        require(width % heads == 0, f"{prefix}num_attention_heads", heads, allowed, where=file)
