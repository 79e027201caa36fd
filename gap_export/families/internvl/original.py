"""InternVL checkpoints as their authors publish them, e.g. OpenGVLab/InternVL3-1B.

Their config.json speaks to code that is published beside the weights, which is never run here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gap_export.checkpoint.find.source import Checkpoint
from gap_export.checkpoint.weights import Weight, read_json_object, rows
from gap_export.checkpoint.weights.files import some
from gap_export.errors import CheckpointError
from gap_export.families.common.checkpoints.limits import require
from gap_export.families.common.checkpoints.matching import peek_config
from gap_export.families.common.checkpoints.parts import Stored, index_folder
from gap_export.families.common.reference import Expected, ModelSource
from gap_export.families.internvl.checkpoint import build_source, read_config, side_of
from gap_export.families.internvl.names import ORIGINAL_KEYS
from gap_export.spec.recipe import Recipe

MODEL_TYPE = "internvl_chat"
_PARTS = ("vision_model.", "mlp1.", "language_model.")
_FUSED = ".attn.qkv."
# What their class takes for granted where a config does not say it.
_DEFAULTS: Mapping[str, Any] = {
    "ps_version": "v1", "downsample_ratio": 0.5, "select_layer": -1, "pad2square": False,
    "use_thumbnail": False,
}  # fmt: skip
_TOWER_DEFAULTS: Mapping[str, Any] = {
    "norm_type": "rms_norm", "qk_normalization": True, "qkv_bias": False,
}  # fmt: skip
# What transformers calls otherwise.
_TOWER_NAMES: Mapping[str, str] = {"qk_normalization": "use_qk_norm", "qkv_bias": "attention_bias"}
_TOWER_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "layer_norm_eps", "hidden_act", "image_size", "patch_size", "num_channels", *_TOWER_DEFAULTS,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class InternVlOriginalLayout:
    """``InternVLChatModel``: queries, keys and values of the tower are one tensor each layer."""

    name: str = "internvl-original"

    def recognizes(self, checkpoint: Checkpoint) -> bool:
        """By the model_type of config.json."""
        return peek_config(checkpoint.main).get("model_type") == MODEL_TYPE

    def read(self, recipe: Recipe, checkpoint: Checkpoint, expected: Expected) -> ModelSource:
        """See :class:`gap_export.families.common.reference.Layout`."""
        folder = checkpoint.main
        found = index_folder(folder)
        _refuse_other_parts(found, folder)
        file = folder / "config.json"
        plain = _as_transformers_has_it(read_json_object(file), file, recipe)
        config = read_config(plain, file, num_tensors=len(found))
        return build_source(
            recipe,
            folder,
            config,
            dict(_split(found)),
            ORIGINAL_KEYS,
            expected,
            layout=self.name,
            files={weight.file for weight in found.values()},
        )


def _as_transformers_has_it(plain: Mapping[str, Any], file: Path, recipe: Recipe) -> dict[str, Any]:
    """The same facts by the names of transformers' own config.

    Raises:
        CheckpointError: tokens are made of patches in another way.
    """
    said = {**_DEFAULTS, **plain}
    for key, wanted, words in (
        ("ps_version", "v2", "tokens in raster order"),
        ("pad2square", False, "no padding"),
        # Of one tile, which is all that a recipe without tiles has, there is no thumbnail anyway.
        *([("use_thumbnail", True, "a thumbnail behind the tiles")] if recipe.image.tiles else []),
    ):
        require(said[key] == wanted, key, said[key], f"{wanted}: {words}", where=file)
    vision, text = plain.get("vision_config"), plain.get("llm_config")
    for key, value in (("vision_config", vision), ("llm_config", text)):
        require(isinstance(value, dict), key, value, "the sizes of that part", where=file)
    assert isinstance(vision, dict) and isinstance(text, dict)
    tower = {**_TOWER_DEFAULTS, **vision}
    size, forced = side_of(tower, "image_size", file), plain.get("force_image_size")
    allowed = f"{size}, vision_config.image_size: positions are not interpolated"
    require(forced in (None, size), "force_image_size", forced, allowed, where=file)
    token = recipe.special_tokens.get(recipe.prompt.image_token)
    return {
        "model_type": "internvl",
        "vision_config": {
            _TOWER_NAMES.get(key, key): tower[key] for key in _TOWER_KEYS if key in tower
        },
        "text_config": text,
        "downsample_ratio": said["downsample_ratio"],
        "vision_feature_layer": said["select_layer"],
        "tie_word_embeddings": text.get("tie_word_embeddings", False),
        # The code beside the weights looks the token up in the tokenizer.
        **({} if token is None else {"image_token_id": token}),
    }


def _refuse_other_parts(found: Mapping[str, Stored], folder: Path) -> None:
    """Refuse a model with more than tower, projector and language model.

    Raises:
        CheckpointError: tensors of other parts.
    """
    others = sorted(key for key in found if not key.startswith(_PARTS))
    if others:
        raise CheckpointError(
            f"{folder} is of another model than InternVL3 or InternVL3.5",
            seen=f"tensors {some(others)}",
            allowed=f"{', '.join(_PARTS)} alone; the -Flash variants, which give some tiles fewer "
            "tokens, are not implemented",
            fix="use the checkpoint without -Flash",
        )


def _split(found: Mapping[str, Stored]) -> Iterator[tuple[str, Weight]]:
    """The tensors, those of queries, keys and values as three ranges of rows each."""
    for key, weight in found.items():
        before, fused, leaf = key.partition(_FUSED)
        if not fused or not weight.shape or weight.shape[0] % 3:
            yield key, weight
            continue
        width = weight.shape[0] // 3
        for place, name in enumerate("qkv"):
            yield f"{before}.attn.{name}.{leaf}", rows(weight, place * width, (place + 1) * width)
